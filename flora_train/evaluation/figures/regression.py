"""Figures of numbers: mean squared and absolute error, R2, and the correlations of Pearson and Spearman."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.evaluation.figures.statistic import (
    Matrix,
    Statistic,
    Vector,
    by_row_blocks,
    check_lengths,
    values_of,
)

Numbers = Sequence[float] | NDArray[Any]

NO_SPREAD = 1e-12
"""Share of the mean square below which a variance is rounding."""


def regression_figures(predictions: Numbers, references: Numbers) -> dict[str, float | None]:
    """mse, mae, r2, pearson and spearman; empty without examples.

    A figure is None where scikit-learn or scipy has none: all of them if a number is not finite, r2 and the
    correlations of one example, and the correlations if all predictions, or all references, are the same.
    """
    return values_of(regression_statistic(predictions, references), check_lengths(predictions, references))


def regression_statistic(predictions: Numbers, references: Numbers) -> Statistic:
    """mse, mae, r2, pearson and spearman."""
    check_lengths(predictions, references)
    predicted = np.asarray(predictions, dtype=np.float64)
    true = np.asarray(references, dtype=np.float64)
    if not (np.isfinite(predicted).all() and np.isfinite(true).all()):
        return _undefined
    errors = predicted - true
    x, y = _centred(predicted), _centred(true)
    rank_x, rank_y = _Ranks(predicted), _Ranks(true)

    def spearman(weights: Matrix) -> Vector:
        return _correlation(weights, rank_x(weights), rank_y(weights))

    def statistic(weights: Matrix) -> dict[str, Vector]:
        examples = weights.sum(axis=1)
        squares = weights @ errors**2
        several = np.where(examples > 1, 1.0, np.nan)
        return {
            "mse": squares / examples,
            "mae": weights @ np.abs(errors) / examples,
            "r2": several * _r2(squares, _variance(weights, y)),
            "pearson": several * _correlation(weights, x, y),
            "spearman": several * by_row_blocks(spearman, weights),
        }

    return statistic


class _Ranks:
    """The ranks of numbers in resamples, the mean rank for equal ones, minus the mean of all ranks."""

    def __init__(self, numbers: Vector) -> None:
        self.order = np.argsort(numbers, kind="stable")
        ascending = numbers[self.order]
        differs = np.concatenate([[True], ascending[1:] != ascending[:-1]])
        self.begins = np.flatnonzero(differs)
        self.group = np.empty(len(numbers), dtype=np.int64)
        self.group[self.order] = differs.cumsum() - 1

    def __call__(self, weights: Matrix) -> Matrix:
        """[R, n]."""
        sizes = np.add.reduceat(weights[:, self.order], self.begins, axis=1)
        ranks = sizes.cumsum(axis=1) - sizes / 2
        return (ranks - weights.sum(axis=1, keepdims=True) / 2)[:, self.group]


def _undefined(weights: Matrix) -> dict[str, Vector]:
    nothing = np.full(len(weights), np.nan)
    return dict.fromkeys(("mse", "mae", "r2", "pearson", "spearman"), nothing)


def _centred(numbers: Vector) -> Vector:
    """The numbers minus their mean, exactly 0 where all are the same."""
    if not len(numbers) or (numbers == numbers[0]).all():
        return np.zeros(len(numbers))
    return numbers - numbers.mean()


def _variance(weights: Matrix, numbers: Vector | Matrix) -> Vector:
    """Sum of squares around the mean of each resample, exactly 0 where it is rounding."""
    examples = weights.sum(axis=1)
    squares = _sums(weights, numbers**2)
    sums = _sums(weights, numbers)
    variance = squares - sums**2 / examples
    return np.where(variance <= NO_SPREAD * squares, 0.0, variance)


def _sums(weights: Matrix, numbers: Vector | Matrix) -> Vector:
    """The weighted sum in each resample. numbers: [n], or [R, n] if they differ between resamples."""
    if numbers.ndim == 1:
        return weights @ numbers
    return (weights * numbers).sum(axis=1)


def _r2(squared_errors: Vector, variance: Vector) -> Vector:
    """1 - errors / variance. Without variance 1 for perfect predictions and 0 for others."""
    constant = np.where(squared_errors == 0, 1.0, 0.0)
    return np.where(variance > 0, 1 - squared_errors / np.where(variance > 0, variance, 1.0), constant)


def _correlation(weights: Matrix, x: Vector | Matrix, y: Vector | Matrix) -> Vector:
    """Pearson's correlation in each resample, NaN where x or y has no variance."""
    examples = weights.sum(axis=1)
    covariance = _sums(weights, x * y) - _sums(weights, x) * _sums(weights, y) / examples
    scale = np.sqrt(_variance(weights, x)) * np.sqrt(_variance(weights, y))
    return np.clip(covariance / np.where(scale > 0, scale, np.nan), -1.0, 1.0)
