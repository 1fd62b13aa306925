"""Checks the files that a checkpoint depends on: metrics.jsonl up to its step, and the best adapters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from flora_train.config.errors import Problem
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.best_adapters import adapter_file, verified_step


class CheckpointDependencies:
    """The files of one run that its checkpoints refer to. Each is read and verified once."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._step_of = cache(lambda name: verified_step(folder.best_adapters, name))

    def find_problem(self, state: Mapping[str, Any], newest: Mapping[str, Any]) -> Problem | None:
        """Why a run that resumes from `state` would not end as if it had not been interrupted. newest: the
        state of the newest whole checkpoint.
        """
        if not self._metrics_are_whole(state):
            return Problem(str(self.folder.metrics), None, "is damaged, cut short or missing")
        step = state["progress"]["step"]
        first_again = step + 1
        if state["progress"]["evaluated"] < step:
            first_again = step  # a checkpoint is saved before the evaluation of its step
        for name, best in state["best"].items():
            on_disk, expected = self._step_of(name), best["step"]
            improved_at = newest["best"].get(name, {"step": -1})["step"]
            # training is deterministic: what was saved after this checkpoint is computed again
            recomputed = improved_at >= first_again or (on_disk is not None and on_disk >= first_again)
            if on_disk != expected and not recomputed:
                problem = (
                    "is damaged or missing" if on_disk is None else f"is of step {on_disk}, not {expected}"
                )
                return Problem(str(adapter_file(self.folder.best_adapters, name)), None, problem)
        return None

    def _metrics_are_whole(self, state: Mapping[str, Any]) -> bool:
        size, sha256 = state["metrics_size"], state["metrics_sha256"]
        return self.folder.metrics_size >= size and self.folder.metrics_digest(size) == sha256
