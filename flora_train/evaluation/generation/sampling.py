"""Greedy and nucleus sampling, in which a draw depends on its row only, not on the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

TOP_TOKENS = 64
"""Likeliest tokens that are tried before the whole vocabulary is sorted."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling."""

    temperature: float
    """0 is greedy."""
    top_p: float
    """Draw from the smallest set of likeliest tokens with this total probability (Holtzman et al. 2020)."""
    seed: int

    def choose(self, logits: Tensor, keys: Sequence[str], positions: Sequence[int]) -> list[int]:
        """The next token of every row.

        logits: [B, V]. keys: names of the rows. positions: number of tokens that each row has drawn before. A
        draw is a function of (seed, key, position) and the row's logits. There is no generator state that
        other rows, a restart or another number of processes could change.
        """
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        probabilities = _usable((logits.float() / self.temperature).softmax(-1))
        chosen = []
        for (tokens, shares), key, position in zip(self._nuclei(probabilities), keys, positions, strict=True):
            chosen.append(_pick(tokens, shares, uniform(self.seed, key, position)))
        return chosen

    def _nuclei(self, probabilities: Tensor) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """The tokens that each row is drawn from, with their probabilities."""
        vocabulary = probabilities.shape[-1]
        if self.top_p >= 1:
            yield from ((np.arange(vocabulary), row) for row in probabilities.double().cpu().numpy())
            return
        values, order = probabilities.topk(min(TOP_TOKENS, vocabulary))
        all_shares, all_tokens = values.double().cpu().numpy(), order.cpu().numpy()
        for row, (shares, tokens) in enumerate(zip(all_shares, all_tokens, strict=True)):
            if shares.sum() < self.top_p:
                vocabulary_sorted = probabilities[row].sort(descending=True)
                shares = vocabulary_sorted.values.double().cpu().numpy()
                tokens = vocabulary_sorted.indices.cpu().numpy()
            inside = shares.cumsum() - shares < self.top_p
            yield tokens[inside], shares[inside]


def _usable(probabilities: Tensor) -> Tensor:
    """Put all probability of a row that is not finite (a diverged adapter) on token 0, so that other rows go
    on.
    """
    lost = ~probabilities.isfinite().all(-1)
    if lost.any():
        probabilities = probabilities.masked_fill(lost[:, None], 0.0)
        probabilities[lost, 0] = 1.0
    return probabilities


def uniform(seed: int, key: str, position: int) -> float:
    """A number in [0, 1) that is a function of the arguments."""
    digest = blake2b(f"{seed}\x1f{key}\x1f{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _pick(tokens: NDArray[np.int64], shares: NDArray[np.float64], quantile: float) -> int:
    """The token at a quantile of the distribution over token ids.

    The order by id makes the result independent of rounding that swaps two tokens of similar probability.
    """
    order = np.argsort(tokens)
    cumulative = shares[order].cumsum()
    index = int(np.searchsorted(cumulative, quantile * cumulative[-1], side="right"))
    return int(tokens[order][min(index, len(tokens) - 1)])
