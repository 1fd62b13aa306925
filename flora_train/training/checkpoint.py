"""From where does an interrupted run go on? Adapters, optimizer and position, never the frozen base."""

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
from flora_train.runtime.atomic import disk_errors, write_atomically
from flora_train.runtime.checksum import DamagedError, check_regular, damaged_file, verify, with_checksums
from flora_train.runtime.run_folder import differences

logger = logging.getLogger(__name__)

FILE = re.compile(r"step-\d{8,}\.safetensors")
CUT_OFF = re.compile(r"\.step-\d{8,}\.safetensors\.\d+\.tmp")
"""What a kill leaves of a checkpoint that is being written."""

ANEW = "resume=false overwrite=true"

Fault = Callable[[Mapping[str, Any], Mapping[str, Any]], Problem | None]
Identity = Mapping[str, Any]
"""What must be the same for a run to go on: dotted configuration keys, hashes of base model and data."""


class Checkpoints:
    """The files checkpoints/step-<n>.safetensors of one run, written by a thread while training goes on.

    keep: so many of the last stay. identity: of this run without the tasks that are named. rows: tensor name up to its first dot ->
    whose rows it has. copy: gives a tensor of its own to what is written while training changes the
    other.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        identity: Callable[[Collection[str]], Identity],
        rows: Mapping[str, Sequence[str]],
        copy: Callable[[Tensor], Tensor] = copy_to_host,
    ) -> None:
        self.folder, self.keep, self.identity, self.rows, self.copy = folder, keep, identity, rows, copy
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], position: Mapping[str, Any]) -> None:
        """Copy the state and begin to write it, atomically; those before the last `keep` are deleted once it is there.

        Raises UserError if the disk is full, or was for the one before; the checkpoints that there were are then still there.
        """
        self.wait()
        copies = {name: self.copy(tensor) for name, tensor in tensors.items()}
        facts = {"step": step, "position": position, "identity": self.identity(()), "rows": self.rows}
        self._writing = self._writer.submit(self._write, step, copies, json.dumps(facts))

    def wait(self) -> None:
        """Until what is being written is on the disk. Raises UserError if it is full."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, tensors: Mapping[str, Tensor], facts: str) -> None:
        header = with_checksums(tensors, facts)
        write_atomically(self.folder / f"step-{step:08d}.safetensors", lambda path: save_file(dict(tensors), path, header))
        _delete(self._files()[: -self.keep])

    def clear(self) -> None:
        """Delete them all: the run has finished."""
        _delete(self.files())

    def files(self) -> list[Path]:
        """Oldest first, with the one that is being written."""
        self.wait()
        return self._files()

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if FILE.fullmatch(path.name))

    def restore(self, tensors: Mapping[str, Tensor], fault: Fault = lambda position, newest: None) -> dict[str, Any] | None:
        """Fill `tensors` from the last whole checkpoint; returns its position, or None if there is none. Rows of adapters that have
        joined since then stay as they are.

        fault: what a checkpoint at `position` needs and is not there; `newest` is the position of the last whole one.
        Raises UserError if it is of another configuration, base model, data or adapter set, or if every one has a fault.
        """
        self.wait()
        _delete(path for path in self.folder.glob(".step-*") if CUT_OFF.fullmatch(path.name))
        newest: dict[str, Any] | None = None
        faults: list[Problem] = []
        for path in reversed(self.files()):
            try:
                facts, content = _read(path)
            except DamagedError as error:
                logger.warning(f"checkpoint {path} is damaged ({error}) and left alone; the one before it is used")
                continue
            self._check(path, facts, content, tensors)
            newest = newest or facts["position"]
            if missing := fault(facts["position"], newest):
                logger.warning(f"checkpoint {path} cannot be used: {missing}; the one before it is tried")
                faults.append(missing)
                continue
            for name, tensor in tensors.items():
                self._fill(name, tensor, facts["rows"], content)
            logger.info(f"going on after step {facts['step']}, from {path}")
            return facts["position"]
        if faults:
            hint = f"{faults[0].hint}, and no checkpoint can do without it: put it back from a copy, or train again ({ANEW})"
            raise user_error(faults[0].key, faults[0].value, hint)
        return None

    def _check(self, path: Path, facts: Mapping[str, Any], content: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        then, now = facts["identity"], self.identity(())
        joined = _tasks(now) - _tasks(then)
        if problems := differences(then, self.identity(joined) if joined else now, f"in checkpoint {path}"):
            raise UserError(*problems)
        known = {name for names in facts["rows"].values() for name in names}
        ours = {name for names in self.rows.values() for name in names}
        if gone := sorted(known - ours):
            raise user_error("adapters", gone[0], f"is in checkpoint {path}, and not in this run: choose another output_dir")
        planes = [{name.partition(".")[2] for name in side} for side in (content, tensors)]
        if planes[0] != planes[1] or (not joined and _shapes(content) != _shapes(tensors)):
            hint = f"holds {_shapes(content)}, this version of flora_train needs {_shapes(tensors)}: begin a new run"
            raise user_error(str(path), None, hint)

    def _fill(self, name: str, tensor: Tensor, rows: Mapping[str, Sequence[str]], content: Mapping[str, Tensor]) -> None:
        """Every adapter's row of one tensor, from wherever the checkpoint has it."""
        group, _, plane = name.partition(".")
        if rows.get(group) == list(self.rows[group]):
            tensor.copy_(content[name])
            return
        places = {adapter: (other, row) for other, names in rows.items() for row, adapter in enumerate(names)}
        for row, adapter in enumerate(self.rows[group]):
            if adapter in places:
                other, place = places[adapter]
                tensor[row].copy_(content[f"{other}.{plane}"][place])


def _delete(files: Iterable[Path]) -> None:
    for file in files:
        with disk_errors(file):
            file.unlink(missing_ok=True)


def _tasks(identity: Identity) -> set[str]:
    return {key.split(".")[1] for key in identity if key.startswith("tasks.")}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def identity_of(settings: Mapping[str, Any], base: str, data: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint must have in common with a run. base: SHA-256 of its weights; data: task -> SHA-256 of its examples."""
    examples = {f"examples of tasks.{name} (SHA-256)": sha for name, sha in data.items()}
    return {**settings, "weights of the base model (SHA-256)": base, **examples}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with damaged_file():
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        verify(header, content)
        return json.loads(header["facts"]), content
