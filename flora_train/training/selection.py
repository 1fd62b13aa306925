"""Selections: the figures that best states are selected by instead of the held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from flora_train.adapters.spec import BASE_ID
from flora_train.training.choice_scores import ChoiceScores
from flora_train.training.heldout import HeldOut

Evaluated: TypeAlias = HeldOut | ChoiceScores
"""The held-out results of a task; of one with a verbalizer, the scores of its words."""


@dataclass(frozen=True)
class Selection:
    """The figure that best states, patience and halving of a task's adapters go by."""

    figure: str
    lower_is_better: bool
    measure: Callable[[Evaluated, int], float]
    """(results, adapter) -> the figure; NaN where it is undefined."""
    of_words: bool = False
    """Whether it is measured on the scores of words."""

    def score(self, value: float) -> float:
        """The figure, or its negative if higher values are better: lower scores are better, as of losses."""
        return value if self.lower_is_better else -value


def measured(
    selections: Mapping[str, Selection],
    heldout: Mapping[str, HeldOut],
    words: Mapping[str, ChoiceScores],
) -> dict[int, float]:
    """Adapter id -> the figure of its task's selection, of the tasks that have one."""
    values: dict[int, float] = {}
    for task, selection in selections.items():
        if task not in heldout:
            continue  # all its adapters have retired
        results: Evaluated = heldout[task]
        if selection.of_words:
            results = words[task]
        for adapter in heldout[task].nats:
            if adapter != BASE_ID:
                values[adapter] = selection.measure(results, adapter)
    return values
