"""What does a run leave on disk, and how is nothing half-written? `outputs/<run>/` and its files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from flora_train.config.errors import Problem, UserError, user_error
from flora_train.config.json_format import parse_object, read_object
from flora_train.config.load import load_saved, save_config
from flora_train.config.paths import exists
from flora_train.config.schema import RunConfig
from flora_train.runtime.atomic import disk_errors, real_path, write_atomically
from flora_train.runtime.environment import environment, now
from flora_train.runtime.manifest import RUN_FILES, Manifest, delete
from flora_train.runtime.metrics_file import MetricsFile
from flora_train.runtime.run_inputs import check_not_data, check_not_replaced
from flora_train.runtime.run_lock import RunLock

logger = logging.getLogger(__name__)

WAIT = 60.0
"""Seconds that a run which is resumed waits for the lock: a process that was told to end needs some for its step."""

LONGEST_ENDING = "..safetensors.4194304.tmp"
"""What the name of an adapter's file has beside the adapter's, while it is written."""

RunStatus = Literal["new", "interrupted", "finished", "extended"]
"""grown: finished, and now asked for more tasks."""


class RunFolder:
    """Paths and writers of one run. Every file is written whole, or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.run_json = path / "run.json"
        self.checkpoints = path / "checkpoints"
        self.best_adapters = self.checkpoints / "best"
        self.adapters = path / "adapters"
        self.evaluation = path / "eval"
        self._lock = RunLock(path)
        self._metrics = MetricsFile(self.metrics)

    @property
    def finished(self) -> bool:
        return bool((self._state or {}).get("finished"))

    def status(self, config: RunConfig) -> RunStatus:
        """What a run of this configuration finds in its folder.

        Raises UserError if it holds something that the user did not say what to do with, or that `resume` cannot go on
        with: a folder that is no run, or a run of another configuration (with every key that differs).
        """
        check_not_data(config, self.path)
        self._check_names(config)
        if not self._occupied:
            if outer := self._outer_run():
                hint = f"is inside the run folder {outer}: choose another output_dir"
                raise user_error("output_dir", str(self.path), hint)
            return "new"
        if self._state is None:
            raise user_error("output_dir", str(self.path), "is not empty and holds no run of ours: choose another folder")
        if config.resume:
            begun = self._begun_with()
            joining = [] if begun is None else [name for name in config.tasks if name not in begun.tasks]
            kept = self.finished and not joining  # its report stands: it is not evaluated again
            if joining and config.sweep.strategy == "halving":
                hint = f"compares the adapters of a run from its first step, and tasks.{joining[0]} joins later: make a new run of it"
                raise user_error("sweep.strategy", "halving", hint)
            if begun is not None and (
                problems := differences(
                    comparable(begun, (), kept), comparable(config, joining, kept), f"when the run in {self.path} began"
                )
            ):
                raise UserError(*problems)
            if not self.finished:
                return "interrupted"
            return "extended" if joining else "finished"
        if config.overwrite:
            self._check_replaceable()
            check_not_replaced(config, self.path)
            return "new"
        kind, resume = ("a finished run", "") if self.finished else ("an unfinished run", "resume=true to go on with it, ")
        hint = f"holds {kind}: choose another output_dir, {resume}or overwrite=true to delete it"
        raise user_error("output_dir", str(self.path), hint)

    def lock(self, wait: float = 0.0) -> None:
        """Keep other processes from training, evaluating or exporting in this folder, until `unlock` or the end of this process. The
        folder is created where it is missing. Raises UserError if another process has it, and still has after `wait` seconds."""
        self._lock.take(wait)

    def share(self) -> None:
        """Keep other processes from training in this folder while this one reads it. Raises UserError if one does."""
        self._lock.share()

    def unlock(self) -> None:
        self._lock.release()

    def enter(self, config: RunConfig) -> RunStatus:
        """`status`, with the lock held. A run that is resumed waits for a process that was told to end.

        Raises UserError as `status` does, or if another process works in the folder.
        """
        with disk_errors(self.path):
            self.status(config)  # nothing is created in a folder that is refused
            self.lock(WAIT if config.resume else 0.0)
            return self.status(config)  # another process may have changed it before this one had the lock

    def claim(self, config: RunConfig, also: Iterable[str] = (), **facts: Any) -> None:
        """Make the folder this run's own. A run that it replaces is deleted, file by file, as its manifest names them.

        also: files that it may write beside RUN_FILES; facts: what run.json says beside the usual.
        """
        status = self.enter(config)
        manifest = Manifest.of(config.adapter_names, (*RUN_FILES, *also))
        state = self._state or {}
        begun = now() if status == "new" else state.get("started", now())
        before = Manifest.read(state.get("files"))
        # run.json first: it is what makes the folder ours, also if the disk is full before the second file
        facts = {"finished": False, "started": begun, **environment(), **facts}
        self.write_run_json({**facts, "files": (manifest | before if before else manifest).to_json()})
        if status == "new" and before is not None:
            self._delete(before)
            self.write_run_json({**facts, "files": manifest.to_json()})
        write_atomically(self.config, lambda path: save_config(config, path))

    def names(self, files: Iterable[str]) -> bool:
        """Whether the manifest has all these names."""
        manifest = Manifest.read((self._state or {}).get("files"))
        return manifest is not None and set(files) <= set(manifest.names)

    def add_files(self, names: Iterable[str]) -> None:
        """Note in the manifest that the run writes these files, too: paths below the folder, or patterns as in RUN_FILES."""
        manifest = Manifest.read((self._state or {}).get("files")) or Manifest.of(())
        more = manifest | Manifest.of((), names)
        if more != manifest:
            self.update_run_json(files=more.to_json())

    def _check_names(self, config: RunConfig) -> None:
        """Raises UserError if an adapter's name is too long for the files that will be called so."""
        folder = next(parent for parent in (self.path, *self.path.absolute().parents) if parent.is_dir())
        longest = (
            os.pathconf(folder, "PC_NAME_MAX") - len(LONGEST_ENDING) if hasattr(os, "pathconf") else 255 - len(LONGEST_ENDING)
        )
        for name in config.adapter_names:
            if len(name.encode()) > longest:
                hint = f"is too long: files are called so, and a name may have {longest} characters here; rename task or adapter"
                raise user_error("adapters", name, hint)

    def _check_replaceable(self) -> None:
        """Raises UserError if it cannot be told which files are the run's."""
        by_hand = "delete the folder by hand, or choose another output_dir"
        manifest = Manifest.read((self._state or {}).get("files"))
        if manifest is None:
            hint = f"holds a run without a manifest of its files (run.json, key files), so that they cannot be told from others: {by_hand}"
            raise user_error("output_dir", str(self.path), hint)
        if links := manifest.links(self.path):
            raise user_error("output_dir", str(self.path), f"{links[0].name} in it is a link to another folder: {by_hand}")
        if not self._lock.enforced:
            hint = f"its file system has no locks, so that another process may be training there unnoticed: {by_hand}"
            raise user_error("output_dir", str(self.path), hint)

    def _delete(self, manifest: Manifest) -> None:
        with disk_errors(self.path):
            ours = manifest.files(self.path)
            first = [path for path in ours if path.parent == self.checkpoints]  # a kill now leaves a run that begins again
            delete([*first, *(path for path in ours if path not in first)], self.path, keep=(self.run_json,))
            others = [path for path in self.path.rglob("*") if path.is_file() and path not in (self.run_json, self._lock.file)]
        if others:
            logger.warning(f"{len(others)} files in {self.path} were not written by the run, and stay")

    def _outer_run(self) -> Path | None:
        """The run folder that this one lies in."""
        return next((parent for parent in real_path(self.path).parents if RunFolder(parent)._state is not None), None)

    def append_metrics(self, record: dict[str, Any]) -> None:
        self._metrics.append(record)

    @property
    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self._metrics.size

    def saved_metrics(self) -> dict[str, Any]:
        """Size and SHA-256 of metrics.jsonl, which is on the disk then."""
        return {"metrics_size": self._metrics.sync(), "metrics_sha256": self._metrics.digest(self.metrics_size)}

    def metrics_digest(self, size: int) -> str:
        """SHA-256 of the first `size` bytes of metrics.jsonl."""
        return self._metrics.digest(size)

    def check_metrics(self) -> None:
        """Raises UserError if metrics.jsonl cannot be read, or is not what it was when the run finished."""
        self.read_metrics("step")
        size, sha = (self.facts().get(key) for key in ("metrics_size", "metrics_sha256"))
        if isinstance(size, int) and (self.metrics_size != size or self.metrics_digest(size) != sha):
            hint = "is not what it was when the run finished: put it back from a copy, or train again (overwrite=true)"
            raise user_error(str(self.metrics), None, hint)

    def cut_metrics(self, size: int) -> None:
        """Forget what was measured after metrics.jsonl had `size` bytes."""
        self._metrics.cut(size)

    def read_metrics(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind (`step`, `evaluation`), oldest first. Raises UserError for a line that is not one of ours."""
        return self._metrics.read(kind)

    def facts(self) -> dict[str, Any]:
        """The content of run.json. Raises UserError if it is damaged."""
        facts = read_object(self.run_json, "put it back from a copy, or train again into another output_dir")
        if problem := _wrong(facts):
            raise user_error(str(self.run_json), None, f"is damaged ({problem}): put it back from a copy")
        return facts

    def write_run_json(self, content: dict[str, Any]) -> None:
        write_atomically(self.run_json, lambda path: path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))

    def update_run_json(self, **content: Any) -> None:
        self.write_run_json({**self.facts(), **content})

    @property
    def _state(self) -> dict[str, Any] | None:
        """The content of run.json; None if there is none, or one that we did not write."""
        if not self.run_json.is_file():
            return None
        try:
            content = parse_object(self.run_json.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return content if isinstance(content.get("finished"), bool) else None

    @property
    def _occupied(self) -> bool:
        if not self.path.is_dir():
            return self.path.exists() or self.path.is_symlink()
        return any(path != self._lock.file for path in self.path.iterdir())

    def _begun_with(self) -> RunConfig | None:
        """The configuration that is recorded here; None where nothing was, because the disk was full when the run began.

        Raises UserError if it cannot be read: what it was is then not known, and nothing can be compared with it.
        """
        if not self.config.exists() and not self.finished and not self.metrics.exists() and not self.checkpoints.exists():
            return None
        if not self.config.exists():
            hint = (
                "is missing, so that it is not known what was trained here: put it back from a copy, or choose another output_dir"
            )
            raise user_error(str(self.config), None, hint)
        return load_saved(self.config)


def comparable(config: RunConfig, without: Collection[str] = (), with_evaluation: bool = False) -> dict[str, Any]:
    """Every key that decides what a run trains and keeps -> its value. without: tasks that are left out, with adapters that learn no
    others; with_evaluation: also keys that only decide how it is evaluated at its end."""
    without = frozenset(without)
    tasks = {name: task for name, task in config.tasks.items() if name not in without}
    adapters = {}
    for name, adapter in config.adapters.items():
        chosen = None if adapter.tasks is None else [task for task in adapter.tasks if task not in without]
        if chosen != []:
            adapters[name] = adapter.model_copy(update={"tasks": chosen})
    rest = config.model_copy(update={"tasks": tasks, "adapters": adapters})
    found = flat(rest.model_dump(mode="json", exclude=HOW_NOT_WHAT))
    return found if with_evaluation else {key: value for key, value in found.items() if not only_evaluates(key)}


HOW_NOT_WHAT: dict[str, Any] = {
    **dict.fromkeys(("output_dir", "overwrite", "resume", "num_processes", "num_threads", "tracking", "paging"), True),
    "audio": {"workers", "cache_gigabytes"},
    "training": {"keep_checkpoints", "compare_separate", "compare_separate_seconds"},
}
"""Keys that may change when a run is resumed. Other processes or threads change sums in their last digits."""

AT_THE_END = frozenset(
    [
        "bootstrap_samples",
        "confidence",
        "max_new_tokens",
        "problems",
        "languages",
        "max_problems",
        "num_samples",
        "pass_at_k",
        "temperature",
        "top_p",
        "beams",
        "embedded_clips",
        "batch_rows",
        "sandbox",
        "cpu_seconds",
        "workers",
    ]
)
"""Keys of `evaluation` that decide nothing before the end of training. The others select adapters, or let them leave."""
OF_A_TASK = frozenset({"language", "license", "sample_prompts", "speech.normalizer", "speech.metric"})
"""Keys of a task that do not."""


def only_evaluates(key: str) -> bool:
    """Whether a dotted key may change in a run that is interrupted: training does not depend on it."""
    section, _, rest = key.partition(".")
    return (section == "evaluation" and rest in AT_THE_END) or (section == "tasks" and rest.partition(".")[2] in OF_A_TASK)


def differences(then: Mapping[str, Any], now: Mapping[str, Any], when: str) -> list[Problem]:
    """One problem for every key whose value is not what it was."""
    problems = []
    for key in dict.fromkeys([*then, *now]):
        if key not in now and only_evaluates(key):
            continue  # an older version compared it
        if then.get(key) != now.get(key):
            was = repr(then[key]) if key in then else "not set"
            hint = f"was {was} {when}: set it back, or choose another output_dir"
            problems.append(Problem(key, now.get(key, "not set"), hint))
    return problems


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys -> values that are no mappings."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def open_run(path: str | os.PathLike[str]) -> tuple[RunFolder, RunConfig]:
    """A run on disk and its configuration. Raises UserError if the folder holds none."""
    folder = open_run_folder(path)
    return folder, load_saved(folder.config)


def open_run_folder(path: str | os.PathLike[str]) -> RunFolder:
    """A run on disk, whose configuration is not read. Raises UserError if the folder holds no run."""
    folder = RunFolder(Path(path))
    if not exists(folder.run_json) or not exists(folder.config):
        raise user_error("run", str(path), "is not a run folder (no run.json and config.yaml in it); runs are in outputs/")
    folder.facts()
    return folder


def _wrong(facts: Mapping[str, Any]) -> str | None:
    """What is wrong with the content of run.json; None if nothing is."""
    training, ended = facts.get("training", {}), facts.get("ended", {})
    wanted: list[tuple[str, object, type]] = [
        ("finished", facts.get("finished"), bool),
        ("started", facts.get("started", ""), str),
        ("training", training, dict),
        ("ended", ended, dict),
    ]
    if isinstance(training, dict):
        wanted.append(("training.seconds", training.get("seconds", {}), dict))
    if isinstance(ended, dict):
        wanted += [(f"ended.{key}", ended.get(key, {}), dict) for key in ("joined", "identity")]
    return next((f"{key} is no {kind.__name__}" for key, value, kind in wanted if not isinstance(value, kind)), None)
