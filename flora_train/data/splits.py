"""Held-out rows and samples. They depend on the seed and the name of the task only, not on other tasks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import user_error
from flora_train.config.schema import RunConfig

Item = TypeVar("Item")


def seed_of(seed: int, *words: str) -> int:
    """A seed derived from another seed and words."""
    return zlib.crc32("\x1f".join((str(seed), *words)).encode())


def seed_of_rows(config: RunConfig, task: str, split: str) -> int:
    """The seed of which rows of a task are held out (`split` is "split"), or which of a split's rows are
    used."""
    own = config.tasks[task].split_seed
    return seed_of(config.seed if own is None else own, task, split)


def hold_out(
    rows: Sequence[Item],
    fraction: float,
    seed: int,
    *,
    key: str,
    group_of: Callable[[Item], Hashable] | None = None,
) -> tuple[list[Item], list[Item]]:
    """(training rows, held-out rows), each in their order.

    group_of: item -> its group (a speaker, a sentence), whose items are held out together. Raises UserError,
    naming `key`.train, if one side would be empty.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, row in enumerate(rows):
        group: Hashable = i
        if group_of is not None:
            group = group_of(row)
        groups.setdefault(group, []).append(i)
    members = list(groups.values())
    if len(members) < 2:
        count = f"{len(rows)} row"
        if group_of is not None:
            count = f"{len(members)} speaker or sentence"
        hint = f"has {count}: none can be held out; give a validation source or more rows"
        raise user_error(f"{key}.train", None, hint)
    target, held = max(1, round(fraction * len(rows))), set[int]()
    for index in np.random.default_rng(seed).permutation(len(members))[:-1]:
        if len(held) >= target:
            break
        held.update(members[index])
    training = [row for i, row in enumerate(rows) if i not in held]
    return training, [row for i, row in enumerate(rows) if i in held]


def hold_out_rows(
    count: int, fraction: float, seed: int, *, key: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training rows, held-out rows) of `count` rows, by their indexes: the same as `hold_out` chooses."""
    if count < 2:
        hint = f"has {count} row: none can be held out; give a validation source or more rows"
        raise user_error(f"{key}.train", None, hint)
    held = np.zeros(count, dtype=np.bool_)
    target = max(1, round(fraction * count))
    held[np.random.default_rng(seed).permutation(count)[:-1][:target]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def sample_rows(rows: NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    """At most `limit` of these indexes: the same as `sample` chooses."""
    if limit is None or limit >= len(rows):
        return rows
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])]


def sample(rows: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """At most `limit` rows, a random sample in their order. None: all."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:limit])]
