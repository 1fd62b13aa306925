"""References: log-probabilities of preferences under references that were computed before training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from flora_train.data.batch import Row
from flora_train.training.preference_rows import part_of

Values = NDArray[np.float64]
Parts = Mapping[int, Values]
"""Part of a preference (see `part_of`) -> log p of every example; NaN where it was not computed."""


class References:
    """The references of all adapters whose reference is not a row of the batch."""

    def __init__(self) -> None:
        self.training: dict[int, Parts] = {}
        """Adapter id -> its reference on training examples."""
        self.validation: dict[int, Parts] = {}

    def logp(self, row: Row) -> float:
        """Of the completion of a training row, for the reference of the row's adapter."""
        return float(self.training[row.adapter][part_of(row)][row.example])

    def heldout(self, adapter: int) -> Parts | None:
        """Part -> log p of every held-out example, for the reference of an adapter; None where its reference
        is the base, whose rows are in the evaluation."""
        return self.validation.get(adapter)
