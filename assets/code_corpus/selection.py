"""Selects the examples that are shipped: a seeded choice in which no single package dominates."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from .duplicates import NearDuplicateIndex
from .examples import Example

MAXIMUM_SIMILARITY = 0.6


@dataclass(frozen=True)
class Quota:
    """How many examples of one kind a split gets."""

    total: int
    per_package: int
    first_ranks: frozenset[int]
    """Ranks that may fill only `first_share` of the total before the others get their turn."""

    first_share: float


QUOTAS: dict[str, dict[str, Quota]] = {
    "train": {
        "function": Quota(900, 80, frozenset({0, 1}), 0.8),
        "file": Quota(150, 15, frozenset({0}), 0.8),
    },
    "validation": {
        "function": Quota(60, 15, frozenset({0, 1}), 0.8),
        "file": Quota(15, 4, frozenset({0}), 0.8),
    },
}


def choose(
    candidates: list[Example],
    quota: Quota,
    seed: int,
    training: NearDuplicateIndex | None,
    dropped: Counter[str],
) -> list[Example]:
    """Choose examples by rank, in turn from every package; duplicates are counted in `dropped`.

    `training` holds the training split's examples when a validation split is chosen.
    """
    taken: list[Example] = []
    index = NearDuplicateIndex()
    per_package: Counter[str] = Counter()
    for rank, example in _in_turn(candidates, seed):
        limit = quota.first_share * quota.total if rank in quota.first_ranks else quota.total
        if len(taken) >= limit or per_package[example.origin.package] >= quota.per_package:
            continue
        reason = _duplicate(example, index, training)
        if reason:
            dropped[reason] += 1
            continue
        index.add(example.code)
        per_package[example.origin.package] += 1
        taken.append(example)
    return taken


def shuffled(examples: list[Example], seed: int) -> list[Example]:
    """A fixed order that mixes packages and kinds."""
    return sorted(examples, key=lambda example: _draw(example, seed))


def _in_turn(candidates: list[Example], seed: int) -> Iterator[tuple[int, Example]]:
    """Candidates by rank; within a rank one of every package, then a second one of every package, ..."""
    piles: dict[tuple[int, str], list[Example]] = defaultdict(list)
    for example in candidates:
        piles[example.rank, example.origin.package].append(example)
    for rank, group in itertools.groupby(sorted(piles), key=lambda key: key[0]):
        ordered = [sorted(piles[key], key=lambda example: _draw(example, seed)) for key in group]
        for row in itertools.zip_longest(*ordered):
            yield from ((rank, example) for example in row if example is not None)


def _duplicate(
    example: Example, index: NearDuplicateIndex, training: NearDuplicateIndex | None
) -> str | None:
    """Why `example` repeats something already taken, or None."""
    if index.has_renamed(example.code):
        return "duplicate (exact or renamed)"
    if index.similarity(example.code) > MAXIMUM_SIMILARITY:
        return "near duplicate"
    if training is None:
        return None
    if training.has_renamed(example.code) or training.similarity(example.code, True) > MAXIMUM_SIMILARITY:
        return "near duplicate of training"
    return None


def _draw(example: Example, seed: int) -> str:
    """A random number that depends on nothing but the seed and the example."""
    key = f"{seed}\0{example.origin.package}\0{example.origin.path}\0{example.prompt}\0{example.completion}"
    return hashlib.sha256(key.encode()).hexdigest()
