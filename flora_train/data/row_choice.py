"""Which rows of a task's sources make up each of its splits, and which of these are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.splits import hold_out_rows, hold_out_strata, sample_rows, sample_strata, seed_of_rows

HELD_OUT_SEEDS = {"test": "split test", "validation": "split"}
"""Split that is made of training rows -> the word that its seed is derived from, in the order in which rows
are held out."""


@dataclass(frozen=True)
class ChosenRows:
    """The rows of a split."""

    source: str
    """Split of the configuration whose rows these are."""
    rows: NDArray[np.int64]
    """Their indexes, ascending."""
    used: NDArray[np.int64]
    """Those of them that are used."""


def choose_rows(
    name: str,
    task: TaskConfig,
    config: RunConfig,
    sizes: Mapping[str, int],
    *,
    strata: Mapping[str, NDArray[np.int64]] | None = None,
) -> dict[str, ChosenRows]:
    """Split -> its rows.

    sizes: source -> number of its rows; strata: source -> the stratum of each row, where rows are held out
    and sampled stratum by stratum. Raises UserError if no row can be held out.
    """
    train, held = np.arange(sizes["train"]), dict[str, NDArray[np.int64]]()
    for split, fraction in _fractions(task, sizes).items():
        seed = seed_of_rows(config, name, HELD_OUT_SEEDS[split])
        if strata is None:
            rest, part = hold_out_rows(len(train), fraction, seed, key=f"tasks.{name}")
        else:
            rest, part = hold_out_strata(strata["train"][train], fraction, seed, key=f"tasks.{name}")
        held[split], train = train[part], train[rest]
    splits = {"train": ("train", train)}
    for split in ("validation", "test"):
        if split in sizes:
            splits[split] = (split, np.arange(sizes[split]))
        elif split in held:
            splits[split] = ("train", held[split])
    limits = {
        "train": task.max_examples,
        "validation": task.max_validation_examples,
        "test": task.max_test_examples,
    }
    chosen = {}
    for split, (source, rows) in splits.items():
        seed = seed_of_rows(config, name, split)
        if strata is None:
            used = sample_rows(rows, limits[split], seed)
        else:
            used = sample_strata(rows, strata[source][rows], limits[split], seed)
        chosen[split] = ChosenRows(source, rows, used)
    return chosen


def _fractions(task: TaskConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """Split -> the share of the rows left that is held out for it."""
    fractions = {}
    if task.test_fraction is not None:
        fractions["test"] = task.test_fraction
    if "validation" not in sizes:
        fractions["validation"] = task.validation_fraction / (1 - fractions.get("test", 0.0))
    return fractions
