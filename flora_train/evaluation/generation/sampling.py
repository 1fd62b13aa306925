"""Which token comes next? The likeliest, or one drawn from the nucleus; a draw depends on the row alone, not on its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        probabilities = _usable((logits.float() / self.temperature).softmax(-1))
        return [
            _pick(ids, shares, uniform(self.seed, key, position))
            for (ids, shares), key, position in zip(self._nuclei(probabilities), keys, positions, strict=True)
        ]

    def _nuclei(self, probabilities: Tensor) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Tokens and their probabilities that each row is drawn from."""
        vocabulary = probabilities.shape[-1]
        if self.top_p >= 1:
            yield from ((np.arange(vocabulary), row) for row in probabilities.double().cpu().numpy())
            return
        values, order = probabilities.topk(min(FIRST, vocabulary))
        all_shares, all_tokens = values.double().cpu().numpy(), order.cpu().numpy()
        for row, (shares, tokens) in enumerate(zip(all_shares, all_tokens, strict=True)):
            if shares.sum() < self.top_p:
                whole = probabilities[row].sort(descending=True)
                shares, tokens = whole.values.double().cpu().numpy(), whole.indices.cpu().numpy()
            inside = shares.cumsum() - shares < self.top_p
            yield tokens[inside], shares[inside]


def _usable(probabilities: Tensor) -> Tensor:
    """A row that is not finite (an adapter that diverged) becomes its first token: it writes nonsense, and stops nobody else."""
    lost = ~probabilities.isfinite().all(-1)
    if lost.any():
        probabilities = probabilities.masked_fill(lost[:, None], 0.0)
        probabilities[lost, 0] = 1.0
    return probabilities


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
