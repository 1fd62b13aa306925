"""Checks the files that a checkpoint needs beside its own: metrics.jsonl up to its step, and the best parameters kept so far."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from flora_train.config.errors import Problem
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.best_adapters import adapter_file, verified_step


class Surroundings:
    """The files of one run that its checkpoints refer to, each read and verified once."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._step = cache(lambda name: verified_step(folder.best_adapters, name))

    def fault(self, position: Mapping[str, Any], newest: Mapping[str, Any]) -> Problem | None:
        """Why a run that goes on from `position` would not end as if preserved_state. newest: the last whole checkpoint's position."""
        if not self._metrics_are(position):
            return Problem(str(self.folder.metrics), None, "is damaged, cut short or missing")
        improved = {newest["names"][adapter]: step for adapter, step, _ in newest["kept"]}
        for adapter, step, _ in position["kept"]:
            name, done = position["names"][adapter], position["step"]
            there = self._step(name)
            # what was kept after this checkpoint is found again: training is deterministic
            found_again = (there is not None and there > done) or improved.get(name, -1) > done
            if there != step and not found_again:
                what = "is damaged or missing" if there is None else f"is of step {there}, not {step}"
                return Problem(str(adapter_file(self.folder.best_adapters, name)), None, what)
        return None

    def _metrics_are(self, position: Mapping[str, Any]) -> bool:
        size, sha = position["metrics_size"], position.get("metrics_sha256")
        return self.folder.metrics_size >= size and (sha is None or self.folder.metrics_digest(size) == sha)
