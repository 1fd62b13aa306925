"""From where does an interrupted run go on? Adapters, optimizer and position, never the frozen base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
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

KEPT = 2
"""Checkpoints on disk: the last, and the one before in case the last is damaged."""

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


@dataclass
class Checkpoints:
    """The files checkpoints/step-<n>.safetensors of one run. say: tells the user one line."""

    folder: Path
    identity: Callable[[], Identity]
    say: Callable[[str], None]

    def save(self, step: int, tensors: Mapping[str, Tensor], position: Mapping[str, Any]) -> None:
        """Write one checkpoint, atomically, then delete those before the last. Raises UserError if the disk is full; the
        checkpoints that there were are then still there."""
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        facts = {"step": step, "position": position, "identity": self.identity()}
        metadata = {"facts": json.dumps(facts), "sha256": _digest(on_cpu.items())}
        write_atomically(self.folder / f"step-{step:08d}.safetensors", lambda path: save_file(on_cpu, path, metadata))
        for old in self.files()[:-KEPT]:
            old.unlink()

    def clear(self) -> None:
        """Delete them all: the run has finished."""
        for path in self.files():
            path.unlink()

    def files(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Fill `tensors` from the last whole checkpoint; returns its position, or None if there is none.

        Raises UserError if it is of another configuration, base model, data or adapter set.
        """
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
