"""The best parameters of every adapter: those of its best held-out loss or figure so far, kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import user_error
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.checksum import DamagedError, check_regular, damaged_file, verify, with_checksums
from flora_train.runtime.distributed import on_every_process, on_main_process
from flora_train.training.train_state import by_id, by_name

HEAD = "head:"
"""What the names of a head's parameters begin with in an adapter's file."""


@dataclass(frozen=True)
class BestCheckpoint:
    """The best state of one adapter."""

    step: int
    """The step of the run."""
    loss: float
    """Held-out loss there, in nats per token."""
    score: float | None = None
    """What states are compared by, where that is not the loss; lower is better."""

    @property
    def compared(self) -> float:
        """What states are compared by."""
        return self.loss if self.score is None else self.score


class BestAdapters:
    """Keeps one file per adapter: its best state, or with select_best=False its latest, whatever its loss."""

    def __init__(self, bank: AdapterBank, folder: Path, *, select_best: bool) -> None:
        self.bank = bank
        self.folder = folder
        self.select_best = select_best
        self.best: dict[int, BestCheckpoint] = {}
        """Adapter id -> its state on disk."""

    def offer(
        self, losses: Mapping[int, float], step: int, scores: Mapping[int, float] = MappingProxyType({})
    ) -> None:
        """Save the adapters that improved.

        losses: held-out, by adapter id, after `step` steps of the run; scores: what states are compared by,
        of adapters for which that is not the loss. Lower is better.
        """
        offered = {i: BestCheckpoint(step, loss, scores.get(i)) for i, loss in losses.items()}
        improved = {i: state for i, state in offered.items() if self._is_improvement(i, state)}
        self.best |= improved
        on_main_process(lambda: self._save(improved))

    def state_dict(self) -> dict[str, Any]:
        return by_name({adapter: asdict(best) for adapter, best in self.best.items()}, self.bank.specs)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Entries whose file is of a later step are dropped: that step comes again, and its evaluation
        decides again.
        """
        for adapter, entry in by_id(state, self.bank.specs).items():
            if best_step(self.folder, self.bank.specs[adapter].name) == entry["step"]:
                self.best[adapter] = BestCheckpoint(**entry)

    def restore(self) -> None:
        """Load the best parameters of every adapter into the bank. Raises UserError, on all processes, if a
        file is missing or damaged.
        """
        on_every_process(lambda: load_best(self.bank, self.best, self.folder))

    def _is_improvement(self, adapter: int, state: BestCheckpoint) -> bool:
        if not self.select_best or adapter not in self.best:
            return True
        return _is_better(state.compared, self.best[adapter].compared)

    def _save(self, states: Mapping[int, BestCheckpoint]) -> None:
        for adapter, state in states.items():
            facts = {"step": state.step, "heldout_loss": state.loss}
            if state.score is not None:
                facts["score"] = state.score
            save_adapter(self.bank, adapter, self.folder, facts)


def load_best(bank: AdapterBank, adapters: Iterable[int], folder: Path) -> dict[int, BestCheckpoint]:
    """Load the best parameters of these adapters into the bank; adapter id -> their step and loss. Raises
    UserError if a file is missing or damaged.
    """
    best = {}
    for adapter in adapters:
        facts = load_adapter(bank, adapter, folder)
        best[adapter] = BestCheckpoint(facts["step"], facts["heldout_loss"], facts.get("score"))
    return best


def _is_better(score: float, than: float) -> bool:
    """Any number is better than NaN."""
    return score < than or (isnan(than) and not isnan(score))


def adapter_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def save_adapter(bank: AdapterBank, adapter: int, folder: Path, facts: dict[str, Any]) -> None:
    """Write the parameters of one adapter, with `facts` (step, held-out loss) in the header, atomically."""
    name = bank.specs[adapter].name
    tensors = {key: view.detach().cpu().contiguous() for key, view in _views(bank, name).items()}
    header = with_checksums(tensors, json.dumps({**facts, "adapter": name}))
    write_atomically(adapter_file(folder, name), lambda path: save_file(tensors, path, header))


def best_step(folder: Path, name: str) -> int | None:
    """The run's step of an adapter's file, by its header; None if there is no readable file."""
    path = adapter_file(folder, name)
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        return int(_facts_of(name, json.loads(header["facts"]))["step"])
    except (OSError, SafetensorError, DamagedError, KeyError, ValueError, TypeError):
        return None


def verified_step(folder: Path, name: str) -> int | None:
    """The run's step of an adapter's file, with all checksums verified; None if the file is missing or
    damaged.
    """
    try:
        facts, _ = _read(adapter_file(folder, name))
        return int(_facts_of(name, facts)["step"])
    except (DamagedError, KeyError, TypeError, ValueError):
        return None


def load_adapter(bank: AdapterBank, adapter: int, folder: Path) -> dict[str, Any]:
    """Load the parameters of one adapter into the bank; returns the facts of the file. Raises UserError if
    the file is missing, damaged or of another shape.
    """
    name = bank.specs[adapter].name
    path = adapter_file(folder, name)
    if not path.exists():
        raise user_error(str(path), None, "no such checkpoint: the run has no saved state of this adapter")
    try:
        written, tensors = _read(path)
        facts = _facts_of(name, written)
        for key, view in _views(bank, name).items():
            tensor = tensors[key]
            if tensor.shape != view.shape:
                hint = f"has shape {tuple(tensor.shape)}, the adapter {tuple(view.shape)}"
                raise user_error(str(path), key, hint)
            view.copy_(tensor)
    except (KeyError, DamagedError) as error:
        hint = "put it back from a copy, or train again (overwrite=true)"
        raise user_error(str(path), None, f"is not a whole checkpoint of {name}: {error}; {hint}") from error
    return facts


def _views(bank: AdapterBank, name: str) -> dict[str, Tensor]:
    """Name in an adapter's file -> view of its parameters."""
    views: dict[str, Tensor] = {}
    for module, parameters in bank.parameters_of(name).items():
        views |= {f"{module}.{parameter}": view for parameter, view in parameters.items()}
    return views | {f"{HEAD}{parameter}": view for parameter, view in bank.head_of(name).items()}


def _facts_of(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without the adapter's name. Raises DamagedError if they are of another adapter, whose file
    may have the same shapes. Files of older versions lack the name.
    """
    written = facts.get("adapter", name)
    if written != name:
        raise DamagedError(f"it holds the adapter {written}")
    return {key: value for key, value in facts.items() if key != "adapter"}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a whole file. Raises DamagedError."""
    with damaged_file():
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        facts = json.loads(header["facts"])
        if header.keys() - {"facts"}:  # files of the oldest versions have no checksums
            verify(header, tensors)
        return facts, tensors
