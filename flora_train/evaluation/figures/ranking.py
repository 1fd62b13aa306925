"""Area under the ROC curve: of two classes, of several one against the rest, and of several labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.evaluation.figures.statistic import (
    Matrix,
    Statistic,
    Vector,
    by_row_blocks,
    check_lengths,
    single_value,
)

Scores = Sequence[Any] | NDArray[Any]


def auroc(scores: Scores, references: Scores) -> float | None:
    """Area under the ROC curve; ties count one half. None if the references are all positive or all
    negative, or a score is not finite.

    scores: [n], higher for the positive class. references: [n], whether an example is positive.
    """
    return single_value(auroc_statistic(scores, references), check_lengths(scores, references))


def auroc_one_vs_rest(scores: Scores, references: Scores) -> float | None:
    """Mean over the classes of the area under the ROC curve of each against the rest. None if a class has no
    example, or a score is not finite.

    scores: [n, classes]. references: [n], index of the class.
    """
    return single_value(one_vs_rest_statistic(scores, references), check_lengths(scores, references))


def auroc_multi_label(scores: Scores, references: Scores) -> float | None:
    """Mean over the labels of the area under the ROC curve of each. None if a label has no example, or has
    all, or a score is not finite.

    scores: [n, labels]. references: [n, labels], whether an example has each label.
    """
    return single_value(multi_label_auroc_statistic(scores, references), check_lengths(scores, references))


def auroc_statistic(scores: Scores, references: Scores) -> Statistic:
    """`auroc`."""
    return _mean_area(
        np.asarray(scores, dtype=np.float64)[:, None], np.asarray(references, dtype=bool)[:, None]
    )


def one_vs_rest_statistic(scores: Scores, references: Scores) -> Statistic:
    """`auroc_one_vs_rest`. A resample without examples of a class has the mean over the others."""
    values = _columns(scores)
    classes = np.arange(values.shape[1])
    return _mean_area(values, np.asarray(references)[:, None] == classes)


def multi_label_auroc_statistic(scores: Scores, references: Scores) -> Statistic:
    """`auroc_multi_label`. A resample in which a label has no example, or all, has the mean over others."""
    return _mean_area(_columns(scores), _columns(references) > 0)


def _columns(values: Scores) -> Matrix:
    matrix = np.asarray(values, dtype=np.float64)
    if not len(matrix):
        return np.zeros((0, 1))
    return matrix


def _mean_area(scores: Matrix, positive: NDArray[np.bool_]) -> Statistic:
    """Mean area of the columns. It is undefined if the area of one column is undefined on all examples."""
    counts = positive.sum(axis=0)
    defined = np.isfinite(scores).all() and bool(((counts > 0) & (counts < len(positive))).all())
    areas: list[Callable[[Matrix], Vector]] = []
    if defined:
        areas = [_area(scores[:, i], positive[:, i]) for i in range(scores.shape[1])]

    def statistic(weights: Matrix) -> dict[str, Vector]:
        if not areas:
            return {"auroc": np.full(len(weights), np.nan)}
        total, columns = np.zeros(len(weights)), np.zeros(len(weights))
        for area in areas:
            values = by_row_blocks(area, weights)
            has_both = ~np.isnan(values)
            total += np.where(has_both, values, 0.0)
            columns += has_both
        return {"auroc": total / np.where(columns > 0, columns, np.nan)}

    return statistic


def _area(scores: Vector, positive: NDArray[np.bool_]) -> Callable[[Matrix], Vector]:
    """The area of weighted examples: weights [R, n] -> [R], NaN without a positive or a negative example."""
    order = np.argsort(scores, kind="stable")
    ascending = scores[order]
    begins = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    is_positive = positive[order]

    def area(weights: Matrix) -> Vector:
        by_score = weights[:, order]
        positives = np.add.reduceat(by_score * is_positive, begins, axis=1)
        negatives = np.add.reduceat(by_score * ~is_positive, begins, axis=1)
        below = negatives.cumsum(axis=1) - negatives / 2
        pairs = positives.sum(axis=1) * negatives.sum(axis=1)
        return (positives * below).sum(axis=1) / np.where(pairs > 0, pairs, np.nan)

    return area
