"""Entity-level F1 of BIO tags, as seqeval defines it by default: an entity may begin with I."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from flora_train.evaluation.figures.statistic import Matrix, Statistic, Vector, check_lengths, single_value

OUTSIDE = "O"
Entity = tuple[str, int, int]
"""Type, first token and last token."""


def are_bio_tags(labels: Iterable[str]) -> bool:
    """Whether the labels are tags of entities: O, and others that begin with B-, I-, E- or S-."""
    tags = {label for label in labels if label != OUTSIDE}
    return bool(tags) and all(tag[:1] in "BIES" and tag[1:2] in ("", "-") for tag in tags)


def entities_of(tags: Sequence[str]) -> set[Entity]:
    """The entities that the tags of a text mark."""
    entities: set[Entity] = set()
    previous, kind, begin = OUTSIDE, "", 0
    for i, label in enumerate([*tags, OUTSIDE]):
        tag, label_kind = label[0], label[1:].split("-", maxsplit=1)[-1] or "_"
        differs = kind != label_kind
        if _ends(previous, tag, differs):
            entities.add((kind, begin, i - 1))
        if _begins(previous, tag, differs):
            begin = i
        previous, kind = tag, label_kind
    return entities


def entity_f1(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float | None:
    """F1 of entities, which are right if their type, beginning and end are; 0 if there are none at all, None
    without examples."""
    return single_value(entity_statistic(predictions, references), check_lengths(predictions, references))


def entity_statistic(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Statistic:
    """`entity_f1`. The unit of resampling is a text."""
    counts = np.zeros((check_lengths(predictions, references), 2))
    for i, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
        check_lengths(predicted, true)
        marked, expected = entities_of(predicted), entities_of(true)
        counts[i] = 2 * len(marked & expected), len(marked) + len(expected)

    def statistic(weights: Matrix) -> dict[str, Vector]:
        twice_hits, total = (weights @ counts).T
        return {"entity_f1": np.divide(twice_hits, total, out=np.zeros(len(weights)), where=total > 0)}

    return statistic


def _ends(previous: str, tag: str, differs: bool) -> bool:
    """Whether an entity ends before a tag. differs: its type is another than that of the previous tag."""
    if previous in "ES" or (previous in "BI" and tag in "BSO"):
        return True
    return previous != OUTSIDE and differs


def _begins(previous: str, tag: str, differs: bool) -> bool:
    """Whether an entity begins with a tag."""
    if tag in "BS" or (previous in "ESO" and tag in "EI"):
        return True
    return tag != OUTSIDE and differs
