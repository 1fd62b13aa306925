"""Statistic: figures of weighted examples, from which a value and its bootstrap resamples are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.evaluation.bootstrap import finite

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Statistic = Callable[[Matrix], Mapping[str, Vector]]
"""Weights [R, n], the times that each example is drawn in each resample -> name of a figure -> its value in
each resample [R], NaN where it is undefined."""

MOST_CELLS = 1 << 22
"""Weights that a figure which sorts the examples handles at once."""


def values_of(statistic: Statistic, examples: int) -> dict[str, float | None]:
    """Name of a figure -> its value on all examples; None where it is undefined."""
    if not examples:
        return {}
    with np.errstate(all="ignore"):
        values = statistic(np.ones((1, examples)))
    return {name: finite(vector[0]) for name, vector in values.items()}


def single_value(statistic: Statistic, examples: int) -> float | None:
    """The value of a statistic with one figure; None where it is undefined."""
    return next(iter(values_of(statistic, examples).values()), None)


def mean_statistic(name: str, values: Sequence[float] | NDArray[Any]) -> Statistic:
    """The mean of a value of each example."""
    numbers = np.asarray(values, dtype=np.float64)
    return lambda weights: {name: weights @ numbers / weights.sum(axis=1)}


def by_row_blocks(function: Callable[[Matrix], Vector], weights: Matrix) -> Vector:
    """`function` of some rows of the weights at a time, so that what it allocates stays small."""
    rows = max(1, MOST_CELLS // max(1, weights.shape[1]))
    blocks = [function(weights[i : i + rows]) for i in range(0, len(weights), rows)]
    return np.concatenate(blocks)


def combined(statistics: Sequence[Statistic]) -> Statistic:
    """The figures of several statistics."""

    def all_of(weights: Matrix) -> dict[str, Vector]:
        values: dict[str, Vector] = {}
        for statistic in statistics:
            values |= statistic(weights)
        return values

    return all_of


def check_lengths(predictions: Sequence[Any] | NDArray[Any], references: Sequence[Any] | NDArray[Any]) -> int:
    """The number of examples. Raises ValueError if there are not as many predictions as references."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references")
    return len(references)
