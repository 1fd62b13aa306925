"""Where does a run stand? What it has done, in which state its parts are, as one mapping that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class TrainState:
    """Steps done, and up to which of them it has logged and evaluated.

    seconds: spent in steps; evaluation_seconds: in evaluations between them; both over all sittings of the run.
    """

    step: int = 0
    logged: int = 0
    evaluated: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0

    def owes_evaluation(self, every: int, also_after: Collection[int]) -> bool:
        """Whether an evaluation is due after the step just done, and has not been."""
        return self.evaluated < self.step and (self.step % every == 0 or self.step in also_after)


BY_ADAPTER = {
    "kept": (),
    "early_stopping": ("gone", "best", "waited"),
    "guard": ("losses", "rolled_back", "quarantined"),
    "tally": ("tokens", "skipped", "recent_nats", "recent_label_tokens", "last"),
}
"""Part of a saved position -> its lists whose entries begin with an adapter's id."""


def renumbered(position: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """A saved position by the ids of a bank that has more adapters. ids: adapter name -> id."""
    before: Sequence[str] = position["names"]
    if {name: i for i, name in enumerate(before)} == dict(ids):
        return dict(position)

    def by_new_ids(entries: Sequence[Sequence[Any]]) -> list[list[Any]]:
        return [[ids[before[adapter]], *rest] for adapter, *rest in entries]

    found = dict(position)
    steps = [0] * len(ids)
    for name, count in zip(before, position["optimizer_steps"], strict=True):
        steps[ids[name]] = count
    found["optimizer_steps"] = steps
    for part, lists in BY_ADAPTER.items():
        if not lists:
            found[part] = by_new_ids(position[part])
            continue
        found[part] = {key: by_new_ids(value) if key in lists else value for key, value in position[part].items()}
    return found
