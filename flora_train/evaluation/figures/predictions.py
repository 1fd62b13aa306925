"""Predicted labels of a contender, in the form of the labels that they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

UNLABELLED = -100
"""Of a token that has no label."""
Targets = Sequence[Any] | NDArray[Any]
"""What `LabelSplit.target` gives for each example."""


class LabelSpecLike(Protocol):
    """The labels of a task."""

    @property
    def task_type(self) -> Literal["single", "multi", "regression", "tokens"]: ...

    @property
    def labels(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class LabelPredictions:
    """The predictions of one contender for all examples."""

    targets: Targets
    """In the form of the references."""
    scores: NDArray[Any] | None = None
    """single and multi: [n, labels], such as probabilities, for the AUROC; None: it is left out."""
