"""TrainState: how far a run has come. Its state, like that of every part of training, is keyed by adapter
name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flora_train.adapters.spec import AdapterSpec

Value = TypeVar("Value")


@dataclass
class TrainState:
    """Counts and times over all sittings of the run."""

    step: int = 0
    """Steps done."""
    logged: int = 0
    """The step of the last log record."""
    evaluated: int = 0
    """The step of the last evaluation."""
    seconds: float = 0.0
    """Spent in training steps."""
    evaluation_seconds: float = 0.0
    """Spent in evaluations between training steps."""

    def evaluation_is_due(self, interval: int, also_after: Collection[int]) -> bool:
        """Whether an evaluation belongs after the last step, and has not been made."""
        return self.evaluated < self.step and (self.step % interval == 0 or self.step in also_after)


def by_name(values: Mapping[int, Value], specs: Sequence[AdapterSpec]) -> dict[str, Value]:
    """Values by adapter id -> the same by adapter name."""
    return {specs[adapter].name: value for adapter, value in values.items()}


def by_id(values: Mapping[str, Value], specs: Sequence[AdapterSpec]) -> dict[int, Value]:
    """Values by adapter name -> the same by adapter id, whatever ids the names had when the values were
    saved.
    """
    ids = {spec.name: adapter for adapter, spec in enumerate(specs)}
    return {ids[name]: value for name, value in values.items()}
