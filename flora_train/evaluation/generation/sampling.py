"""Which token comes next? The likeliest, or one drawn from the nucleus; a draw depends on the row alone, not on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

FIRST = 64
"""Likeliest tokens that are looked at before a whole vocabulary is sorted."""


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 is greedy; top_p: draw from the fewest likeliest tokens that have this probability together (Holtzman et
    al. 2020); seed: of every draw."""

    temperature: float
    top_p: float
    seed: int

    def choose(self, logits: Tensor, keys: Sequence[str], positions: Sequence[int]) -> list[int]:
        """The next token of every row. logits: [B, V]; keys: what names a row; positions: tokens that it has drawn before.

        The draw is a function of (seed, key, position) and the row's own logits: no generator has a state that other rows, a
        restart or another number of processes could shift.
        """
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        probabilities = (logits.float() / self.temperature).softmax(-1)
        candidates, weights = self._nuclei(probabilities)
        return [
            _pick(ids, shares, uniform(self.seed, key, position))
            for ids, shares, key, position in zip(candidates, weights, keys, positions, strict=True)
        ]

    def _nuclei(self, probabilities: Tensor) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float64]]]:
        vocabulary = probabilities.shape[-1]
        if self.top_p >= 1:
            everything = np.arange(vocabulary)
            return [everything] * len(probabilities), list(probabilities.double().cpu().numpy())
        ids: list[NDArray[np.int64]] = []
        weights: list[NDArray[np.float64]] = []
        values, order = probabilities.topk(min(FIRST, vocabulary))
        for row in range(len(probabilities)):
            shares, tokens = values[row].double(), order[row]
            if shares.sum() < self.top_p:
                sorted_row = probabilities[row].sort(descending=True)
                shares, tokens = sorted_row.values.double(), sorted_row.indices
            inside = (shares.cumsum(0) - shares < self.top_p).cpu().numpy()
            ids.append(tokens.cpu().numpy()[inside])
            weights.append(shares.cpu().numpy()[inside])
        return ids, weights


def uniform(seed: int, key: str, position: int) -> float:
    """A number in [0, 1) that depends on its arguments only."""
    digest = blake2b(f"{seed}\x1f{key}\x1f{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _pick(ids: NDArray[np.int64], shares: NDArray[np.float64], at: float) -> int:
    """Inverse of the distribution function, in the order of token ids: rounding that swaps two likely tokens changes nothing."""
    order = np.argsort(ids)
    cumulative = shares[order].cumsum()
    place = int(np.searchsorted(cumulative, at * cumulative[-1], side="right"))
    return int(ids[order][min(place, len(ids) - 1)])
