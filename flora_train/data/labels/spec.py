"""LabelSpec: what the labels of a task are, and how many outputs its heads have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

LabelType: TypeAlias = Literal["single", "multi", "regression", "tokens"]
"""One label of a text, any number of labels, a number, or one label for each token."""

Target: TypeAlias = int | float | tuple[int, ...] | tuple[float, ...]
"""What an example is labelled with: see `LabelSplit.target`."""


@dataclass(frozen=True)
class LabelSpec:
    """The labels of a task whose adapters have a head."""

    task_type: LabelType
    labels: tuple[str, ...] = ()
    """The names of the classes, in the order of the outputs; empty for regression."""
    class_weights: tuple[float, ...] | None = None
    """Weight of each class in the loss, which is the weighted mean over all rows of an adapter in a step;
    None: all are equal. Only of `single` and `tokens`."""

    @property
    def outputs(self) -> int:
        """Size of the head's output: 1 for regression, else one for each label."""
        return 1 if self.task_type == "regression" else len(self.labels)
