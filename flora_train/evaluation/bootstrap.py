"""Bootstrap intervals over held-out examples, with the same resamples for every contender."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flora_train.evaluation.result_model import Interval
from flora_train.training.heldout import HeldOut

MAX_WEIGHTS = 1 << 25
"""Weights of examples in resamples that are in memory at the same time."""
MAX_PAIRED = 64
"""Number of contenders up to which each is compared with each; of more, each is compared with the best."""

Contender = TypeVar("Contender")


@dataclass(frozen=True)
class Estimate:
    """A value and its bootstrap percentile interval."""

    value: float
    low: float
    high: float
    single_example: bool = False
    """No interval can be computed from one example: low and high are the value, and no difference is
    clear."""

    @property
    def excludes_zero(self) -> bool:
        return not self.single_example and (self.low > 0 or self.high < 0)

    def interval(self) -> Interval:
        """The estimate as results hold it, with None for values that are not finite."""
        return Interval(
            value=finite(self.value),
            low=finite(self.low),
            high=finite(self.high),
            excludes_zero=self.excludes_zero,
        )


def finite(value: float | None) -> float | None:
    """The value if it is finite, otherwise None: JSON has no NaN and no infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Comparison:
    """Estimates of a ratio of sums on one task, such as bits per byte or errors per word."""

    contenders: Mapping[int, Estimate]
    """Contender id -> its ratio."""
    differences: Mapping[tuple[int, int], Estimate]
    """(a, b) -> ratio of a minus ratio of b, paired by example; negative if a is better."""


def compare(heldout: HeldOut, *, samples: int, confidence: float, seed: int) -> Comparison:
    """Bits per byte of every contender and every pair, with intervals."""
    bits = {contender: nats / np.log(2) for contender, nats in heldout.nats.items()}
    return compare_ratios(bits, heldout.label_bytes, samples=samples, confidence=confidence, seed=seed)


def compare_ratios(
    numerators: Mapping[int, NDArray[Any]],
    denominators: NDArray[Any],
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> Comparison:
    """sum(numerators) / sum(denominators) of every contender and every pair, with intervals at `confidence`.

    numerators: contender id -> [n]. denominators: [n], the same for all. samples: number of resamples. The
    unit of resampling is an example, as tokens or words in one example are not independent. Source: Efron &
    Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval of a ratio of sums).
    """
    n, ids = len(denominators), sorted(numerators)
    parts: dict[int, list[NDArray[np.float64]]] = {contender: [] for contender in ids}
    # a loss that is not finite makes ratios NaN
    with np.errstate(invalid="ignore", divide="ignore"):
        for weights in resampled_weights(n, samples=samples, seed=seed):
            sums = weights @ denominators
            for contender in ids:
                parts[contender].append(weights @ numerators[contender] / sums)
        resampled = {contender: np.concatenate(parts[contender]) for contender in ids}
        values = {contender: float(numerators[contender].sum() / denominators.sum()) for contender in ids}
        estimator = Estimator(confidence, single_example=n == 1)
        return Comparison(
            contenders={contender: estimator(values[contender], resampled[contender]) for contender in ids},
            differences=_Differences(values, resampled, estimator),
        )


def resampled_weights(n: int, *, samples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks [resamples, n] of the times that each example is drawn in a resample of n examples."""
    generator = np.random.default_rng(seed)
    rows = max(1, MAX_WEIGHTS // n)
    for first in range(0, samples, rows):
        size = min(rows, samples - first)
        yield generator.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)


def compared_pairs(
    contenders: Sequence[Contender], best: Contender | None
) -> list[tuple[Contender, Contender]]:
    """The pairs whose difference is reported: their number grows linearly beyond MAX_PAIRED contenders.

    best: one of the contenders; None if there is none.
    """
    if len(contenders) <= MAX_PAIRED:
        return list(combinations(contenders, 2))
    if best is None:
        return []
    position = contenders.index(best)
    earlier = [(contender, best) for contender in contenders[:position]]
    return earlier + [(best, contender) for contender in contenders[position + 1 :]]


@dataclass(frozen=True)
class Estimator:
    """Computes percentile intervals."""

    confidence: float
    single_example: bool

    def __call__(self, value: float, resampled: NDArray[np.float64]) -> Estimate:
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(resampled, [tail, 1 - tail])
        return Estimate(value, float(low), float(high), self.single_example)


@dataclass(frozen=True, eq=False)
class _Differences(Mapping[tuple[int, int], Estimate]):
    """The differences of all pairs, each computed on access: a sweep of thousands has millions of pairs."""

    values_of: Mapping[int, float]
    resampled: Mapping[int, NDArray[np.float64]]
    estimator: Estimator

    def __getitem__(self, pair: tuple[int, int]) -> Estimate:
        a, b = pair
        if a == b:
            raise KeyError(pair)
        with np.errstate(invalid="ignore"):
            difference = self.resampled[a] - self.resampled[b]
            return self.estimator(self.values_of[a] - self.values_of[b], difference)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return permutations(self.values_of, 2)

    def __len__(self) -> int:
        return len(self.values_of) * (len(self.values_of) - 1)
