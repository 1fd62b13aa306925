"""Which rows are held out, and which of many are used? Decided by seed, so that adding a task changes no other's."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

from flora_train.config.errors import user_error
from flora_train.config.schema import RunConfig

Item = TypeVar("Item")


def seed_of(seed: int, *words: str) -> int:
    """A seed that depends on its words only."""
    return zlib.crc32("\x1f".join((str(seed), *words)).encode())


def seed_of_rows(config: RunConfig, task: str, split: str) -> int:
    """The seed of which rows of a task are held out (`split` is "split"), or which of a split's rows are used."""
    own = config.tasks[task].split_seed
    return seed_of(config.seed if own is None else own, task, split)


def hold_out(
    rows: Sequence[Item], fraction: float, seed: int, key: str, group_of: Callable[[Item], Hashable] | None = None
) -> tuple[list[Item], list[Item]]:
    """(the rest, held-out rows), each in their order. group_of: rows of one group (a speaker, a sentence) are held out together.

    Raises UserError, naming `key`.train, if nothing would be left on one side."""
    groups: dict[Hashable, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(i if group_of is None else group_of(row), []).append(i)
    members = list(groups.values())
    if len(members) < 2:
        what = f"{len(rows)} row" if group_of is None else f"{len(members)} speaker or sentence"
        raise user_error(f"{key}.train", None, f"has {what}: none can be held out; give a validation source or more rows")
    wanted, held = max(1, round(fraction * len(rows))), set[int]()
    for group in np.random.default_rng(seed).permutation(len(members))[:-1]:
        if len(held) >= wanted:
            break
        held.update(members[group])
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def sample(rows: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """At most so many of them, in their order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:limit])]
