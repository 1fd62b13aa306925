"""Which parameters of an adapter are its best? Those of its lowest held-out loss so far, kept on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path

from flora_train.adapters.bank import AdapterBank
from flora_train.training.adapter_file import kept_step, load_adapter, save_adapter
from flora_train.training.distributed import on_every_process, on_main_process


@dataclass(frozen=True)
class Kept:
    """The kept state of one adapter: the run's step and the held-out loss (nats per token) there."""

    step: int
    loss: float


class Selection:
    """Keeps one checkpoint per adapter. best=False: the latest, whatever its loss."""

    def __init__(self, bank: AdapterBank, folder: Path, best: bool) -> None:
        self.bank = bank
        self.folder = folder
        self.best = best
        self.kept: dict[int, Kept] = {}

    def offer(self, losses: Mapping[int, float], step: int) -> None:
        """Held-out losses by adapter id after `step` steps: keep the adapters that improved."""
        better = {
            adapter: loss
            for adapter, loss in losses.items()
            if not self.best or adapter not in self.kept or _is_better(loss, self.kept[adapter].loss)
        }
        self.kept |= {adapter: Kept(step, loss) for adapter, loss in better.items()}
        on_main_process(lambda: self._save(better, step))

    def _save(self, losses: Mapping[int, float], step: int) -> None:
        for adapter, loss in losses.items():
            save_adapter(self.bank, adapter, self.folder, {"step": step, "heldout_loss": loss})

    def take(self, kept: Mapping[int, Kept]) -> None:
        """Go on from what a checkpoint knows. A file that was written after it is not what it knows of: the next evaluation, which may
        be another one now, decides anew."""
        for adapter, known in kept.items():
            if kept_step(self.folder, self.bank.specs[adapter].name) == known.step:
                self.kept[adapter] = known

    def restore(self) -> None:
        """Put the kept parameters of every adapter back into the bank. Raises UserError, on all processes, if a file is missing or damaged."""
        on_every_process(lambda: load_kept(self.bank, self.kept, self.folder))


def load_kept(bank: AdapterBank, adapters: Iterable[int], folder: Path) -> dict[int, Kept]:
    """Put the parameters that were kept of these adapters into the bank; adapter id -> their step and loss. Raises UserError if a file is
    missing or damaged."""
    facts = {adapter: load_adapter(bank, adapter, folder) for adapter in adapters}
    return {adapter: Kept(known["step"], known["heldout_loss"]) for adapter, known in facts.items()}


def _is_better(loss: float, than: float) -> bool:
    """Any number is better than NaN."""
    return loss < than or (isnan(than) and not isnan(loss))
