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


def hold_out_strata(
    strata: NDArray[np.int64], fraction: float, seed: int, *, key: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training rows, held-out rows) by their indexes, with the same share of every stratum held out.

    strata: of each row. A stratum of two or more rows has at least one of them on each side; the row of a
    stratum that has one is a training row. Raises UserError if no stratum has two.
    """
    counts = np.bincount(strata)
    held_counts = held_of_strata(counts, max(1, round(fraction * len(strata))))
    if not held_counts.any():
        hint = (
            f"has {len(strata)} row(s), and no two with the same label, so that none can be held out: give a "
            "validation source or more rows, or set stratify: false"
        )
        raise user_error(f"{key}.train", None, hint)
    held = np.zeros(len(strata), dtype=np.bool_)
    order = np.random.default_rng(seed).permutation(len(strata))
    for stratum in np.flatnonzero(held_counts):
        held[order[strata[order] == stratum][: held_counts[stratum]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def held_of_strata(counts: NDArray[np.int64], target: int) -> NDArray[np.int64]:
    """Rows of each stratum that are held out, together `target` where that is possible: in proportion, with
    the largest remainders rounded up."""
    lowest, highest = np.minimum(counts // 2, 1), np.maximum(counts - 1, 0)
    exact = counts * target / max(1, counts.sum())
    held = np.clip(np.floor(exact).astype(np.int64), lowest, highest)
    order = np.argsort(held - exact, kind="stable")
    while held.sum() < target and (held < highest).any():
        open_strata = order[held[order] < highest[order]]
        held[open_strata[: target - held.sum()]] += 1
    return held


def sample_strata(
    rows: NDArray[np.int64], strata: NDArray[np.int64], limit: int | None, seed: int
) -> NDArray[np.int64]:
    """At most `limit` of these indexes, in their order: one of every stratum as far as the limit allows, then
    in proportion. A smaller sample with the same seed is part of a larger one.

    strata: of these rows.
    """
    if limit is None or limit >= len(rows):
        return rows
    order = np.random.default_rng(seed).permutation(len(rows))
    sizes = np.bincount(strata)
    seen = np.zeros_like(sizes)
    share = np.empty(len(rows))
    for index in order:
        stratum = strata[index]
        share[index] = seen[stratum] / sizes[stratum]
        seen[stratum] += 1
    chosen = order[np.argsort(share[order], kind="stable")[:limit]]
    return rows[np.sort(chosen)]
