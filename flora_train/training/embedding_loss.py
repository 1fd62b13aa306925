"""The loss of embeddings: every anchor finds its positive among the texts of its draw."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class DrawEmbeddings:
    """The embeddings of n pairs or triplets of one draw, [n, d] each."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor | None = None


@dataclass(frozen=True)
class DrawTexts:
    """What identifies the texts of a draw: equal texts have equal keys."""

    anchors: Sequence[Hashable]
    positives: Sequence[Hashable]
    negatives: Sequence[Hashable] = ()


def contrastive_losses(
    embeddings: DrawEmbeddings, texts: DrawTexts, *, temperature: float, symmetric: bool
) -> Tensor:
    """The loss of each pair of a draw, float64 [n].

    For anchor i: -log softmax(cos(a_i, c_j) / temperature) at its own positive, over the positives c_j of the
    draw and its negatives (Henderson et al. 2017; van den Oord et al. 2018). Symmetric: the mean with the
    same of positive i over the anchors. What `known_pairs` finds is no negative, and left out of the sum.
    """
    anchors = F.normalize(embeddings.anchors.double(), dim=1, eps=1e-12)
    candidates = embeddings.positives
    if embeddings.negatives is not None:
        candidates = torch.cat([candidates, embeddings.negatives])
    similarities = anchors @ F.normalize(candidates.double(), dim=1, eps=1e-12).T
    excluded = known_pairs(texts).to(similarities.device)
    scores = (similarities / temperature).masked_fill(excluded, float("-inf"))
    losses = -scores.log_softmax(dim=1).diagonal()
    if not symmetric:
        return losses
    backward = scores[:, : len(anchors)].T.log_softmax(dim=1).diagonal()
    return (losses - backward) / 2


def known_pairs(texts: DrawTexts) -> Tensor:
    """Which candidates of a draw are no negatives of its anchors, bool [n, n] or [n, 2 n]: the same text as
    the anchor itself, or as a positive of the same anchor. The own positive, on the diagonal, is False.
    """
    positives_of: dict[Hashable, set[Hashable]] = {}
    for anchor, positive in zip(texts.anchors, texts.positives, strict=True):
        positives_of.setdefault(anchor, {anchor}).add(positive)
    candidates = [*texts.positives, *texts.negatives]
    known = []
    for i, anchor in enumerate(texts.anchors):
        own = positives_of[anchor]
        known.append([candidate in own and j != i for j, candidate in enumerate(candidates)])
    return torch.tensor(known, dtype=torch.bool).reshape(len(texts.anchors), len(candidates))
