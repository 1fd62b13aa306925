"""Checkpoints of an interrupted run: adapters, optimizer and training state, never the frozen base."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flora_train.adapters.host_memory import copy_to_host
from flora_train.config.errors import Problem, UserError, user_error
from flora_train.config.json_format import JsonObject, JsonValue
from flora_train.runtime.atomic import disk_errors, write_atomically
from flora_train.runtime.checksum import DamagedError, check_regular, damaged_file, verify, with_checksums
from flora_train.runtime.config_changes import differences

logger = logging.getLogger(__name__)

FILE = re.compile(r"step-\d{8,}\.safetensors")
CUT_OFF = re.compile(r"\.step-\d{8,}\.safetensors\.\d+\.tmp")
"""What a kill leaves of a checkpoint that is being written."""

RESTART = "resume=false overwrite=true"

FindProblem = Callable[[Mapping[str, Any], Mapping[str, Any]], Problem | None]
"""Takes the state of a checkpoint and that of the newest whole one; returns why the former cannot be resumed
from.
"""

Identity = Mapping[str, JsonValue]
"""What must be the same for a run to be resumed: dotted configuration keys, hashes of base model and data."""


def no_problem(state: Mapping[str, Any], newest: Mapping[str, Any]) -> Problem | None:
    return None


class Checkpoints:
    """The files checkpoints/step-<n>.safetensors of one run, written by a thread while training continues."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        identity: Callable[[Collection[str]], Identity],
        rows: Mapping[str, Sequence[str]],
        copy: Callable[[Tensor], Tensor] = copy_to_host,
    ) -> None:
        self.folder = folder
        self.keep = keep
        """Number of checkpoints to retain."""
        self.identity = identity
        """The identity of the present run without the named tasks."""
        self.rows = rows
        """Tensor name up to its first dot -> the adapters of the tensor's rows."""
        self.copy = copy
        """Clones a tensor so that it can be written in the background."""
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy tensors and state and begin to write them, atomically. Once they are on disk, all but the last
        `keep` checkpoints are deleted.

        Raises UserError if the disk is full, or was full for the previous checkpoint; existing checkpoints
        remain.
        """
        self.wait()
        copies = {name: self.copy(tensor) for name, tensor in tensors.items()}
        facts = {"step": step, "state": state, "identity": self.identity(()), "rows": self.rows}
        self._writing = self._writer.submit(self._write, step, copies, json.dumps(facts))

    def wait(self) -> None:
        """Wait for the checkpoint that is being written. Raises UserError if the disk is full."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def clear(self) -> None:
        """Delete all checkpoints: the run has finished."""
        _delete(self.files())

    def files(self) -> list[Path]:
        """Oldest first, including the one that is being written."""
        self.wait()
        return self._files()

    def restore(
        self, tensors: Mapping[str, Tensor], find_problem: FindProblem = no_problem
    ) -> dict[str, Any] | None:
        """Fill `tensors` from the last whole checkpoint; returns its state, or None if there is none. Rows of
        adapters that were added since then do not change.

        find_problem: see FindProblem. Raises UserError if the checkpoint is of another configuration, base
        model, data or adapter set, or if no checkpoint can be resumed from.
        """
        self.wait()
        _delete(path for path in self.folder.glob(".step-*") if CUT_OFF.fullmatch(path.name))
        newest: dict[str, Any] | None = None
        problems: list[Problem] = []
        for path in reversed(self.files()):
            try:
                facts, content = _read(path)
            except DamagedError as error:
                logger.warning(
                    f"checkpoint {path} is damaged ({error}) and is not deleted; the one before it is used"
                )
                continue
            self._check(path, facts, content, tensors)
            newest = newest or facts["state"]
            if problem := find_problem(facts["state"], newest):
                logger.warning(f"checkpoint {path} cannot be used: {problem}; the one before it is tried")
                problems.append(problem)
                continue
            for name, tensor in tensors.items():
                self._fill(name, tensor, facts["rows"], content)
            logger.info(f"resuming after step {facts['step']}, from {path}")
            return facts["state"]
        if problems:
            first = problems[0]
            hint = (
                f"{first.hint}, and every checkpoint needs it: put it back from a copy, or train again "
                f"({RESTART})"
            )
            raise user_error(first.key, first.value, hint)
        return None

    def _write(self, step: int, tensors: Mapping[str, Tensor], facts: str) -> None:
        header = with_checksums(tensors, facts)
        file = self.folder / f"step-{step:08d}.safetensors"
        write_atomically(file, lambda path: save_file(dict(tensors), path, header))
        _delete(self._files()[: -self.keep])

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if FILE.fullmatch(path.name))

    def _check(
        self,
        path: Path,
        facts: Mapping[str, Any],
        content: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Raises UserError if a checkpoint is not one of this run."""
        if "state" not in facts:
            hint = f"was written by an older version of flora_train: train again ({RESTART})"
            raise user_error(str(path), None, hint)
        then, now = facts["identity"], self.identity(())
        added = _tasks(now) - _tasks(then)
        if added:
            now = self.identity(added)
        if problems := differences(then, now, f"in checkpoint {path}"):
            raise UserError(*problems)
        removed = _adapters(facts["rows"]) - _adapters(self.rows)
        if removed:
            hint = f"is in checkpoint {path}, and not in this run: choose another output_dir"
            raise user_error("adapters", min(removed), hint)
        shapes_differ = not added and _shapes(content) != _shapes(tensors)
        if _planes(content) != _planes(tensors) or shapes_differ:
            hint = (
                f"holds {_shapes(content)}, this version of flora_train needs {_shapes(tensors)}: begin a "
                "new run"
            )
            raise user_error(str(path), None, hint)

    def _fill(
        self, name: str, tensor: Tensor, rows: Mapping[str, Sequence[str]], content: Mapping[str, Tensor]
    ) -> None:
        """Copy every adapter's row of one tensor from the checkpoint, whose pools may be others."""
        group, _, plane = name.partition(".")
        if rows.get(group) == list(self.rows[group]):
            tensor.copy_(content[name])
            return
        location = {}
        for saved_group, adapters in rows.items():
            for row, adapter in enumerate(adapters):
                location[adapter] = saved_group, row
        for row, adapter in enumerate(self.rows[group]):
            if adapter in location:
                saved_group, saved_row = location[adapter]
                tensor[row].copy_(content[f"{saved_group}.{plane}"][saved_row])


def identity_of(settings: Mapping[str, JsonValue], base: str, data: Mapping[str, str]) -> JsonObject:
    """The identity of a run. base: SHA-256 of its weights; data: task -> SHA-256 of its examples."""
    examples = {f"examples of tasks.{name} (SHA-256)": sha for name, sha in data.items()}
    return {**settings, "weights of the base model (SHA-256)": base, **examples}


def _delete(files: Iterable[Path]) -> None:
    for file in files:
        with disk_errors(file):
            file.unlink(missing_ok=True)


def _tasks(identity: Identity) -> set[str]:
    return {key.split(".")[1] for key in identity if key.startswith("tasks.")}


def _adapters(rows: Mapping[str, Sequence[str]]) -> set[str]:
    return set().union(*rows.values())


def _planes(tensors: Mapping[str, Tensor]) -> set[str]:
    return {name.partition(".")[2] for name in tensors}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a whole file. Raises DamagedError."""
    with damaged_file():
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        verify(header, content)
        return json.loads(header["facts"]), content
