"""Which rows are scored in one batch: similar lengths, and as many contenders as there is room for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

Place = tuple[int, int]
"""A row: its contender and the index of its sequence."""


def plan_batches(
    lengths: Sequence[int],
    contenders: Sequence[int],
    *,
    max_tokens: int,
    independent_up_to: int | None = None,
) -> list[list[Place]]:
    """Batches of every sequence for every contender, each ordered by contender, the longest sequences first.

    A batch has at most `max_tokens` padded tokens, or one row. All contenders get a group of sequences before
    the next group is read. Contenders share a batch where the group does not fill one: a full batch of one
    contender is computed at least as fast as one that mixes several.

    lengths: of each sequence. independent_up_to: longer rows are batched with rows of the same length only,
    because their positions depend on the longest row of a batch.
    """
    batches = []
    for group in _groups(lengths, max_tokens, independent_up_to):
        room = max(1, max_tokens // (len(group) * lengths[group[0]]))
        size = ceil(len(contenders) / ceil(len(contenders) / room))
        for first in range(0, len(contenders), size):
            shared = contenders[first : first + size]
            batches.append([(contender, index) for contender in shared for index in group])
    return batches


def _groups(lengths: Sequence[int], max_tokens: int, independent_up_to: int | None) -> Iterator[list[int]]:
    """Sequences that fit in one batch of one contender, the longest first."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if group:
            longest = lengths[group[0]]
            full = (len(group) + 1) * longest > max_tokens
            dependent = independent_up_to is not None and longest > independent_up_to
            if full or (dependent and lengths[index] != longest):
                yield group
                group = []
        group.append(index)
    if group:
        yield group
