"""How sure are we of a difference? Bootstrap over held-out examples, the same resamples for every contender."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flora_train.training.heldout import HeldOut


@dataclass(frozen=True)
class Estimate:
    """A figure and its bootstrap percentile interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Bits per byte on one task. contenders: id -> estimate; differences: (a, b) -> estimate of bits(a) - bits(b),
    paired by example, negative where a is better."""

    contenders: Mapping[int, Estimate]
    differences: Mapping[tuple[int, int], Estimate]


def compare(heldout: HeldOut, samples: int, confidence: float, seed: int) -> Comparison:
    """Bits per byte of every contender and every pair, with intervals at `confidence` from `samples` resamples.

    An example is the unit that is resampled: tokens within one are not independent. Source: Efron & Tibshirani,
    "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval of a ratio of sums).
    """
    n = len(heldout.label_bytes)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples).astype(np.float64)
    bytes_drawn = weights @ heldout.label_bytes
    ids = sorted(heldout.nats)
    with np.errstate(invalid="ignore"):  # a loss that is not finite makes its figures NaN, which is what they are
        bits = {c: weights @ heldout.nats[c] / np.log(2) / bytes_drawn for c in ids}
        point = {c: heldout.bits_per_byte(c) for c in ids}
        return Comparison(
            contenders={c: _estimate(point[c], bits[c], confidence) for c in ids},
            differences={
                (a, b): _estimate(point[a] - point[b], bits[a] - bits[b], confidence) for a in ids for b in ids if a != b
            },
        )


def _estimate(value: float, resampled: NDArray[np.float64], confidence: float) -> Estimate:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
