"""RunFolder: whether a run may use its folder, how it claims it, and how it opens it again."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from flora_train.config.errors import UserError, user_error
from flora_train.config.json_format import JsonValue
from flora_train.config.load import load_saved, save_config
from flora_train.config.paths import exists
from flora_train.config.schema import RunConfig
from flora_train.runtime.atomic import disk_errors, real_path, write_atomically
from flora_train.runtime.config_changes import comparable, differences
from flora_train.runtime.environment import environment, now
from flora_train.runtime.hub_snapshot import pin_commits
from flora_train.runtime.manifest import RUN_FILES, Manifest, delete, delete_leftovers
from flora_train.runtime.run_files import RunFiles
from flora_train.runtime.run_inputs import check_not_data, check_not_replaced
from flora_train.runtime.run_lock import RunLock

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 60.0
"""Seconds that a resumed run waits for the lock: a process that was asked to stop finishes its step first."""

LONGEST_ENDING = "..safetensors.4194304.tmp"
"""What is added to an adapter's name in the names of its files, at most."""

FEDERATED_RESULTS = "eval/federated.json"
"""What federated runs write instead of eval/report.json."""

BY_HAND = "delete the folder by hand, or choose another output_dir"

RunStatus = Literal["new", "interrupted", "finished", "extended"]
"""What a run is for its folder. extended: finished, and now to be continued with more tasks."""


class RunFolder(RunFiles):
    """The folder of one run, which one process group at a time may write to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._lock = RunLock(path)

    def status(self, config: RunConfig) -> RunStatus:
        """What a run of this configuration is for its folder.

        Raises UserError if the folder holds something else: files that are not a run, a run that is neither
        to be resumed nor to be overwritten, or one of another configuration (with every key that differs).
        """
        check_not_data(config, self.path)
        self._check_names(config)
        if not self._is_occupied():
            self._check_not_inside_a_run()
            return "new"
        if not self.known_facts:
            hint = "is not empty and holds no run: choose another folder"
            raise user_error("output_dir", str(self.path), hint)
        if config.resume:
            return self._status_of_resumed(config)
        if config.overwrite:
            self._check_replaceable()
            check_not_replaced(config, self.path)
            return "new"
        present, resume = "an unfinished run", "resume=true to continue it, "
        if self.finished:
            present, resume = "a finished run", ""
        hint = f"holds {present}: choose another output_dir, {resume}or overwrite=true to delete it"
        raise user_error("output_dir", str(self.path), hint)

    def _status_of_resumed(self, config: RunConfig) -> RunStatus:
        """Raises UserError if the run cannot be continued with this configuration."""
        begun = self._config_at_begin()
        added = [] if begun is None else [name for name in config.tasks if name not in begun.tasks]
        if added and config.sweep.strategy == "halving":
            hint = (
                f"compares the adapters of a run from its first step, and tasks.{added[0]} joins later: "
                "start a new run"
            )
            raise user_error("sweep.strategy", "halving", hint)
        if begun is not None:
            evaluates_again = not self.finished or bool(added)
            then = comparable(begun, with_evaluation=not evaluates_again)
            present = comparable(config, added, with_evaluation=not evaluates_again)
            if problems := differences(then, present, f"when the run in {self.path} began"):
                raise UserError(*problems)
        if not self.finished:
            return "interrupted"
        return "extended" if added else "finished"

    def lock(self, wait: float = 0.0) -> None:
        """Keep other processes from training, evaluating or exporting in this folder, until `unlock` or the
        end of this process. Creates the folder where it is missing. Raises UserError if another process still
        has it after `wait` seconds.
        """
        self._lock.take(wait)

    def share(self) -> None:
        """Keep other processes from training in this folder while this one reads it. Raises UserError if one
        does.
        """
        self._lock.share()

    def unlock(self) -> None:
        self._lock.release()

    def enter(self, config: RunConfig) -> RunStatus:
        """Lock the folder and return the run's `status`. A resumed run waits for a process that was told to
        stop.

        Raises UserError as `status` does, or if another process works in the folder.
        """
        with disk_errors(self.path):
            self.status(config)  # a folder that is refused stays unchanged
            self.lock(LOCK_TIMEOUT if config.resume else 0.0)
            return self.status(config)  # another process may have changed it before this one had the lock

    def claim(self, config: RunConfig, also: Iterable[str] = (), **facts: Any) -> None:
        """Make this the folder of the run. A run that it replaces is deleted, file by file, by its manifest;
        of a run that it continues, what killed writes left.

        also: files that the run may write beside RUN_FILES; facts: more entries of run.json.
        """
        status = self.enter(config)
        manifest = Manifest.of(config.adapter_names, (*RUN_FILES, *also))
        previous, previous_facts = self.manifest, self.known_facts
        started: JsonValue = now()
        if status != "new":
            started = previous_facts.get("started", started)
        # run.json first: it marks the folder as a run even if the disk is full before the second file
        facts = {"finished": False, "started": started, **environment().model_dump(), **facts}
        with_previous = manifest if previous is None else manifest | previous
        self.write_run_json({**facts, "files": with_previous.to_json()})
        if status == "new" and previous is not None:
            self._delete(previous)
            self.write_run_json({**facts, "files": manifest.to_json()})
        elif status != "new":
            with disk_errors(self.path):
                delete_leftovers(with_previous, self.path)
        write_atomically(self.config, lambda path: save_config(config, path))

    def _check_names(self, config: RunConfig) -> None:
        """Raises UserError if an adapter's name is too long for the names of its files."""
        folder = next(parent for parent in (self.path, *self.path.absolute().parents) if parent.is_dir())
        longest = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        longest -= len(LONGEST_ENDING)
        for name in config.adapter_names:
            if len(name.encode()) > longest:
                hint = (
                    f"is too long for a file name: at most {longest} characters here; rename task or adapter"
                )
                raise user_error("adapters", name, hint)

    def _check_replaceable(self) -> None:
        """Raises UserError if it is not known which files are the run's."""
        manifest = self.manifest
        if manifest is None:
            hint = (
                "holds a run whose run.json does not list its files (key files), so that others may be "
                f"among them: {BY_HAND}"
            )
            raise user_error("output_dir", str(self.path), hint)
        if links := manifest.links(self.path):
            hint = f"{links[0].name} in it is a link to another folder: {BY_HAND}"
            raise user_error("output_dir", str(self.path), hint)
        if not self._lock.enforced:
            hint = (
                "its file system has no locks, so that another process may be training there unnoticed: "
                f"{BY_HAND}"
            )
            raise user_error("output_dir", str(self.path), hint)

    def _delete(self, manifest: Manifest) -> None:
        with disk_errors(self.path):
            files = manifest.files(self.path)
            files.sort(
                key=lambda path: path.parent != self.checkpoints
            )  # after a kill, the run begins at its first step
            delete(files, self.path, keep=(self.run_json,))
            own = (self.run_json, self._lock.file)
            others = [path for path in self.path.rglob("*") if path.is_file() and path not in own]
        if others:
            logger.warning(f"{len(others)} files in {self.path} were not written by the run, and stay")

    def _is_occupied(self) -> bool:
        if not self.path.is_dir():
            return self.path.exists() or self.path.is_symlink()
        return any(path != self._lock.file for path in self.path.iterdir())

    def _check_not_inside_a_run(self) -> None:
        for parent in real_path(self.path).parents:
            if RunFiles(parent).known_facts:
                hint = f"is inside the run folder {parent}: choose another output_dir"
                raise user_error("output_dir", str(self.path), hint)

    def _config_at_begin(self) -> RunConfig | None:
        """The recorded configuration; None where nothing was recorded, because the disk was full when the run
        began.

        Raises UserError if it is missing or cannot be read: then the present one cannot be compared with it.
        """
        if self.config.exists():
            return load_saved(self.config)
        if self.finished or self.metrics.exists() or self.checkpoints.exists():
            hint = (
                "is missing, so that it is not known what was trained here: put it back from a copy, or "
                "choose another output_dir"
            )
            raise user_error(str(self.config), None, hint)
        return None


def open_run(path: str | os.PathLike[str]) -> tuple[RunFolder, RunConfig]:
    """A run on disk and its configuration.

    Raises UserError if the folder holds none, or a federated run: that has the global adapters of several
    strategies, and no bank of adapters that each learn a task.
    """
    folder = open_run_folder(path)
    config = load_saved(folder.config)
    if config.federated is not None:
        hint = (
            f"is a federated run: flora-train report {path} shows its results, and its global adapters are "
            f"PEFT folders in {folder.adapters}, which PEFT loads; those of texts can be served from there "
            "with flora-train serve"
        )
        raise user_error("run", str(path), hint)
    return folder, config


def is_federated(folder: RunFolder) -> bool:
    """Whether the run of a folder is one of federated rounds, by the files that it writes."""
    return folder.names([FEDERATED_RESULTS])


def open_run_folder(path: str | os.PathLike[str]) -> RunFolder:
    """A run on disk, whose configuration is not read. The hub is read at the commits that the run recorded.

    Raises UserError if the folder holds no run.
    """
    folder = RunFolder(Path(path))
    if not exists(folder.run_json) or not exists(folder.config):
        hint = "is not a run folder (no run.json and config.yaml in it); runs are in outputs/"
        raise user_error("run", str(path), hint)
    pin_commits(folder.facts().hub_commits or {})
    return folder
