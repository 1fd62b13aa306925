"""The loss of embeddings and its gradients in float64, written by hand from the definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class ReferenceLoss:
    """Losses [n], and the gradient of their sum by every embedding, [parts, n, d]."""

    losses: list[float]
    gradients: NDArray[np.float64]


def cosine(a: Vector, b: Vector) -> float:
    return float(a @ b) / (sqrt(float(a @ a)) * sqrt(float(b @ b)))


def d_cosine(a: Vector, b: Vector) -> Vector:
    """The derivative of cosine(a, b) by a."""
    length = sqrt(float(a @ a))
    return b / (length * sqrt(float(b @ b))) - cosine(a, b) * a / length**2


def contrastive(
    embeddings: NDArray[np.float64],
    texts: Sequence[Sequence[object]],
    *,
    temperature: float,
    symmetric: bool = False,
) -> ReferenceLoss:
    """embeddings: [parts, n, d]; texts: their texts, part by part. One scalar at a time."""
    n = embeddings.shape[1]
    gradients = np.zeros_like(embeddings)
    candidates = [(part, j) for part in range(1, len(embeddings)) for j in range(n)]
    losses = []
    directions = [("anchors", candidates)]
    if symmetric:
        directions.append(("positives", [(0, j) for j in range(n)]))
    for i in range(n):
        loss = 0.0
        for direction, others in directions:
            query = (0, i) if direction == "anchors" else (1, i)
            target = (1, i) if direction == "anchors" else (0, i)
            allowed = [other for other in others if other == target or not same(texts, query, other)]
            scores = [cosine(embeddings[query], embeddings[other]) / temperature for other in allowed]
            largest = max(scores)
            total = sum(exp(score - largest) for score in scores)
            share = 1.0 / len(directions)
            loss += share * (largest + log(total) - scores[allowed.index(target)])
            for other, score in zip(allowed, scores, strict=True):
                weight = exp(score - largest) / total - float(other == target)
                weight *= share / temperature
                gradients[query] += weight * d_cosine(embeddings[query], embeddings[other])
                gradients[other] += weight * d_cosine(embeddings[other], embeddings[query])
        losses.append(loss)
    return ReferenceLoss(losses, gradients)


def same(texts: Sequence[Sequence[object]], query: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the texts are the same, or a pair of the draw."""
    first, second = texts[query[0]][query[1]], texts[other[0]][other[1]]
    pairs = list(zip(texts[0], texts[1], strict=True))
    pair = (first, second) if query[0] == 0 else (second, first)
    return first == second or pair in pairs
