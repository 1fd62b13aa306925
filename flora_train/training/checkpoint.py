"""From where does an interrupted run go on? Adapters, optimizer and position, never the frozen base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flora_train.atomic import write_atomically
from flora_train.config.errors import UserError, fail
from flora_train.training.run_folder import differences

Identity = Mapping[str, Any]
"""What must be the same for a run to go on: dotted configuration keys, hashes of base model and data, adapter names."""


class DamagedError(Exception):
    """A checkpoint file that is not what was written."""


@dataclass
class Position:
    """Where a run stands: steps done, and up to which of them it has logged and evaluated.

    seconds: spent in steps; evaluation_seconds: in evaluations between them; both over all sittings of the run.
    """

    done: int = 0
    logged: int = 0
    evaluated: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0


class Checkpoints:
    """The files checkpoints/step-<n>.safetensors of one run, written by a thread while training goes on.

    keep: so many of the last stay. say: tells the user one line.
    """

    def __init__(self, folder: Path, keep: int, identity: Callable[[], Identity], say: Callable[[str], None]) -> None:
        self.folder, self.keep, self.identity, self.say = folder, keep, identity, say
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], position: Mapping[str, Any]) -> None:
        """Copy the state and begin to write it, atomically; those before the last `keep` are deleted once it is there.

        Raises UserError if the disk was full for the one before; the checkpoints that there were are then still there.
        """
        self.wait()
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        facts = {"step": step, "position": position, "identity": self.identity()}
        self._writing = self._writer.submit(self._write, step, copies, json.dumps(facts))

    def wait(self) -> None:
        """Until what is being written is on the disk. Raises UserError if it is full."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, tensors: Mapping[str, Tensor], facts: str) -> None:
        metadata = {"facts": facts, "sha256": _digest(tensors.items())}
        write_atomically(self.folder / f"step-{step:08d}.safetensors", lambda path: save_file(dict(tensors), path, metadata))
        for old in self._files()[: -self.keep]:
            old.unlink()

    def clear(self) -> None:
        """Delete them all: the run has finished."""
        for path in self.files():
            path.unlink()

    def files(self) -> list[Path]:
        """Oldest first, with the one that is being written."""
        self.wait()
        return self._files()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))

    def restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Fill `tensors` from the last whole checkpoint; returns its position, or None if there is none.

        Raises UserError if it is of another configuration, base model, data or adapter set.
        """
        for cut_off in self.folder.glob(".step-*.tmp"):  # by a kill while it was written
            cut_off.unlink()
        for path in reversed(self.files()):
            try:
                facts, content = _read(path)
            except DamagedError as error:
                self.say(f"checkpoint {path} is damaged ({error}) and left alone; the one before it is used")
                continue
            self._check(path, facts["identity"], content, tensors)
            for name, tensor in tensors.items():
                tensor.copy_(content[name])
            self.say(f"going on after step {facts['step']}, from {path}")
            return facts["position"]
        return None

    def _check(self, path: Path, then: Identity, content: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        if problems := differences(then, self.identity(), f"in checkpoint {path}"):
            raise UserError(*problems)
        shapes = [{name: tuple(tensor.shape) for name, tensor in side.items()} for side in (content, tensors)]
        if shapes[0] != shapes[1]:
            raise fail(str(path), None, f"holds {shapes[0]}, this version of flora_train needs {shapes[1]}: begin a new run")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all weights of the base, whatever is wrapped around it."""
    state = model.state_dict()
    return _digest((name.replace(".base_layer", ""), state[name]) for name in sorted(state))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise DamagedError(str(error)) from error
    if metadata.get("sha256") != _digest(sorted(content.items())):
        raise DamagedError("its content does not match its checksum")
    return json.loads(metadata["facts"]), content


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _parts(tensor):
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Flat pieces of at most 64 MiB, so that a copy of a large weight never exists."""
    flat = tensor.reshape(-1)
    yield from flat.split(max(1, (64 << 20) // max(1, tensor.element_size())))
