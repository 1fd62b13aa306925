"""How sure are we of a difference? Bootstrap over held-out examples, the same resamples for every contender."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.evaluation.result_model import Interval
from flora_train.training.heldout import HeldOut

AT_ONCE = 1 << 25
"""Numbers of the resamples that are in memory at one time."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its bootstrap percentile interval. single_example: of a single example, which says nothing of others: the interval has no width, and
    nothing is clear."""

    value: float
    low: float
    high: float
    single_example: bool = False

    @property
    def excludes_zero(self) -> bool:
        return not self.single_example and (self.low > 0 or self.high < 0)

    def interval(self) -> Interval:
        """The estimate as results hold it, where None stands for what is not finite."""
        return Interval(value=finite(self.value), low=finite(self.low), high=finite(self.high), excludes_zero=self.excludes_zero)


def finite(value: float | None) -> float | None:
    """A figure as JSON can hold it."""
    return float(value) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Comparison:
    """A ratio of sums on one task (bits per byte, errors per word). contenders: id -> estimate; differences: (a, b) -> estimate of
    ratio(a) - ratio(b), paired by example, negative where a is better."""

    contenders: Mapping[int, Estimate]
    differences: Mapping[tuple[int, int], Estimate]


def compare(heldout: HeldOut, samples: int, confidence: float, seed: int) -> Comparison:
    """Bits per byte of every contender and every pair, with intervals."""
    bits = {contender: nats / np.log(2) for contender, nats in heldout.nats.items()}
    return compare_ratios(bits, heldout.label_bytes, samples, confidence, seed)


def compare_ratios(
    numerators: Mapping[int, NDArray[Any]], denominators: NDArray[Any], samples: int, confidence: float, seed: int
) -> Comparison:
    """sum(numerators) / sum(denominators) of every contender and every pair, with intervals at `confidence` from `samples` resamples.

    numerators: id -> [n]; denominators: [n], the same for all. An example is the unit that is resampled: tokens or words within one
    are not independent. Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval of a
    ratio of sums).
    """
    n, ids = len(denominators), sorted(numerators)
    generator = np.random.default_rng(seed)
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # a loss that is not finite makes its figures NaN, which is what they are
        parts: dict[int, list[NDArray[np.float64]]] = {c: [] for c in ids}
        for first in range(0, samples, rows := max(1, AT_ONCE // n)):
            weights = generator.multinomial(n, np.full(n, 1 / n), size=min(rows, samples - first)).astype(np.float64)
            drawn = weights @ denominators
            for c in ids:
                parts[c].append(weights @ numerators[c] / drawn)
        ratios = {c: np.concatenate(parts[c]) for c in ids}
        point = {c: float(numerators[c].sum() / denominators.sum()) for c in ids}
        return Comparison(
            contenders={c: _estimate(point[c], ratios[c], confidence, n == 1) for c in ids},
            differences=_Differences(point, ratios, confidence, n == 1),
        )


class _Differences(Mapping[tuple[int, int], Estimate]):
    """Of every pair, made when it is asked for: a sweep of thousands has millions of pairs."""

    def __init__(
        self, point: Mapping[int, float], ratios: Mapping[int, NDArray[np.float64]], confidence: float, single_example: bool
    ) -> None:
        self.point, self.ratios, self.confidence, self.single_example = point, ratios, confidence, single_example

    def __getitem__(self, pair: tuple[int, int]) -> Estimate:
        a, b = pair
        if a == b:
            raise KeyError(pair)
        with np.errstate(invalid="ignore"):
            return _estimate(self.point[a] - self.point[b], self.ratios[a] - self.ratios[b], self.confidence, self.single_example)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return permutations(self.point, 2)

    def __len__(self) -> int:
        return len(self.point) * (len(self.point) - 1)


def _estimate(value: float, resampled: NDArray[np.float64], confidence: float, single_example: bool) -> Estimate:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), single_example)
