"""Which parameters of an adapter are its best? Those of its lowest held-out loss so far, kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import user_error
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.checksum import DamagedError, check_regular, damaged_file, verify, with_checksums
from flora_train.runtime.distributed import on_every_process, on_main_process


@dataclass(frozen=True)
class BestCheckpoint:
    """The kept state of one adapter: the run's step and the held-out loss (nats per token) there."""

    step: int
    loss: float


class Selection:
    """Keeps one checkpoint per adapter. best=False: the latest, whatever its loss."""

    def __init__(self, bank: AdapterBank, folder: Path, best: bool) -> None:
        self.bank = bank
        self.folder = folder
        self.best = best
        self.kept: dict[int, BestCheckpoint] = {}

    def offer(self, losses: Mapping[int, float], step: int) -> None:
        """Held-out losses by adapter id after `step` steps: keep the adapters that improved."""
        better = {
            adapter: loss
            for adapter, loss in losses.items()
            if not self.best or adapter not in self.kept or _is_better(loss, self.kept[adapter].loss)
        }
        self.kept |= {adapter: BestCheckpoint(step, loss) for adapter, loss in better.items()}
        on_main_process(lambda: self._save(better, step))

    def _save(self, losses: Mapping[int, float], step: int) -> None:
        for adapter, loss in losses.items():
            save_adapter(self.bank, adapter, self.folder, {"step": step, "heldout_loss": loss})

    def take(self, kept: Mapping[int, BestCheckpoint]) -> None:
        """Go on from what a checkpoint knows. A file that was written after it is not what it knows of: the next evaluation, which may
        be another one now, decides anew."""
        for adapter, known in kept.items():
            if kept_step(self.folder, self.bank.specs[adapter].name) == known.step:
                self.kept[adapter] = known

    def restore(self) -> None:
        """Put the kept parameters of every adapter back into the bank. Raises UserError, on all processes, if a file is missing or damaged."""
        on_every_process(lambda: load_best(self.bank, self.kept, self.folder))


def load_best(bank: AdapterBank, adapters: Iterable[int], folder: Path) -> dict[int, BestCheckpoint]:
    """Put the parameters that were kept of these adapters into the bank; adapter id -> their step and loss. Raises UserError if a file is
    missing or damaged."""
    facts = {adapter: load_adapter(bank, adapter, folder) for adapter in adapters}
    return {adapter: BestCheckpoint(known["step"], known["heldout_loss"]) for adapter, known in facts.items()}


def _is_better(loss: float, than: float) -> bool:
    """Any number is better than NaN."""
    return loss < than or (isnan(than) and not isnan(loss))


def adapter_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def save_adapter(bank: AdapterBank, adapter: int, folder: Path, facts: dict[str, Any]) -> None:
    """Write one adapter's numbers and facts about them (step, held-out loss), atomically."""
    name = bank.specs[adapter].name
    tensors = {
        f"{module}.{param}": tensor.detach().cpu().contiguous()
        for module, params in bank.parameters_of(name).items()
        for param, tensor in params.items()
    }
    header = with_checksums(tensors, json.dumps({**facts, "adapter": name}))
    write_atomically(adapter_file(folder, name), lambda path: save_file(tensors, path, header))


def kept_step(folder: Path, name: str) -> int | None:
    """The run's step after which this adapter's file was written; None if there is none that can be read."""
    try:
        check_regular(adapter_file(folder, name))
        with safe_open(adapter_file(folder, name), framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
        return int(_of(name, facts)["step"])
    except (OSError, SafetensorError, DamagedError, KeyError, ValueError, TypeError):
        return None


def verified_step(folder: Path, name: str) -> int | None:
    """As `kept_step`, of a file that is whole; None if it is missing or damaged."""
    try:
        return int(_of(name, _read(adapter_file(folder, name))[0])["step"])
    except (DamagedError, KeyError, TypeError, ValueError):
        return None


def load_adapter(bank: AdapterBank, adapter: int, folder: Path) -> dict[str, Any]:
    """Read one adapter's numbers into the bank; returns its facts. Raises UserError if the file is missing, damaged
    or of another shape."""
    name = bank.specs[adapter].name
    path = adapter_file(folder, name)
    if not path.exists():
        raise user_error(str(path), None, "no such checkpoint: the run has no saved state of this adapter")
    try:
        written, content = _read(path)
        facts = _of(name, written)
        for module, params in bank.parameters_of(name).items():
            for param, view in params.items():
                tensor = content[f"{module}.{param}"]
                if tensor.shape != view.shape:
                    raise user_error(
                        str(path), f"{module}.{param}", f"has shape {tuple(tensor.shape)}, the adapter {tuple(view.shape)}"
                    )
                view.copy_(tensor)
    except (KeyError, DamagedError) as error:
        hint = "put it back from a copy, or train again (overwrite=true)"
        raise user_error(str(path), None, f"is not a whole checkpoint of {name}: {error}; {hint}") from error
    return facts


def _of(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts beside its name. Raises DamagedError if they are of another adapter: its file may have the same shapes. Older files do not say whose they
    are."""
    if (written := facts.get("adapter", name)) != name:
        raise DamagedError(f"it holds the adapter {written}")
    return {key: value for key, value in facts.items() if key != "adapter"}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a whole file. Raises DamagedError."""
    with damaged_file():
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        facts = json.loads(header["facts"])
        if header.keys() - {"facts"}:  # the oldest files have no checksums
            verify(header, content)
        return facts, content
