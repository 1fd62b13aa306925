"""Counts of a task's rows, examples and tokens, as `flora-train data` prints them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from rich.console import Console
from rich.table import Table

from flora_train.config.terminal_text import in_cell, print_table
from flora_train.data.embeddings.split import EmbeddingSplit
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.data.labels.split import LabelSplit
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.data.task import Task
from flora_train.data.token_split import TokenSplit
from flora_train.runtime.progress import duration

SPLITS = {"train": "training", "validation": "held-out", "test": "test"}
"""Field of a task -> heading of its column."""
LEFT_OUT = {
    "unsampled": "left out: over the limit on examples",
    "empty": "left out: without text to learn",
    "over_long_dropped": "left out: longer than max_length",
    "prompt_too_long": "left out: nothing learnt within max_length",
}
"""Field of a split's counts -> label of its line."""
CHANGED = {
    "over_long_truncated": "cut off at max_length",
    "over_long_split": "divided at max_length",
}
"""The same of rows that are used in part, or in parts."""

MOST_LABELS = 30
"""Labels that are counted one by one."""

Counts = dict[str, list[str]]
"""Label of a line -> its value in each split of the task."""


def splits_of(task: Task) -> dict[str, TokenSplit]:
    """Heading -> split, of those that the task has."""
    splits = {heading: getattr(task, field) for field, heading in SPLITS.items()}
    return {heading: split for heading, split in splits.items() if split is not None}


def count_lines(task: Task) -> Counts:
    """All lines. Reasons that left out no row have none."""
    splits = list(splits_of(task).values())
    numbers: dict[str, list[int]] = {"rows": [split.counts.rows for split in splits]}
    numbers["used"] = [_used(split) for split in splits]
    numbers |= _if_any(splits, LEFT_OUT)
    for reason in dict.fromkeys(reason for split in splits for reason in split.counts.unusable):
        numbers[f"left out: {reason}"] = [len(split.counts.unusable.get(reason, ())) for split in splits]
    numbers |= _if_any(splits, CHANGED)
    if any(split.is_packed for split in splits):
        numbers["documents"] = [split.counts.documents for split in splits]
        numbers["packed sequences"] = [len(split) if split.is_packed else 0 for split in splits]
    else:
        is_paired = isinstance(task.train, PreferenceSplit) and task.train.is_paired
        name = "pairs" if is_paired else "examples"
        if isinstance(task.train, EmbeddingSplit):
            name = "triplets" if task.train.spec.has_negatives else "pairs"
        numbers[name] = [len(split) for split in splits]
    numbers["tokens"] = [split.counts.tokens for split in splits]
    learns_tokens = not isinstance(task.train, EmbeddingSplit | LabelSplit)
    if learns_tokens:
        numbers["learnt tokens"] = [split.counts.label_tokens for split in splits]
    lines = {label: [f"{value:,}" for value in values] for label, values in numbers.items()}
    if learns_tokens:
        lines["share learnt"] = [f"{learnt_share(split):.0%}" for split in splits]
    lines["tokens of the longest"] = [f"{longest(split):,}" for split in splits]
    if any(split.counts.seconds for split in splits):
        lines["length of the clips"] = [duration(split.counts.seconds) for split in splits]
    return lines | label_lines(splits)


def label_lines(splits: list[TokenSplit]) -> Counts:
    """Of labelled texts: the examples of each label with their share, the most frequent label of the first
    split first; or the range of numbers."""
    labelled = [split for split in splits if isinstance(split, LabelSplit | ChoiceSplit)]
    if not labelled:
        return {}
    if isinstance(labelled[0], LabelSplit) and labelled[0].spec.task_type == "regression":
        return {"numbers, lowest to highest": [_range(np.asarray(split.targets)) for split in labelled]}
    counts = [split.label_counts_by_name for split in labelled]
    totals = [_units(split) for split in labelled]
    order = sorted(counts[0], key=lambda label: -counts[0][label])
    lines = {}
    for label in order[:MOST_LABELS]:
        shares = zip(counts, totals, strict=True)
        lines[f"label {label}"] = [f"{of[label]:,} ({of[label] / max(1, n):.0%})" for of, n in shares]
    rest = order[MOST_LABELS:]
    if rest:
        name = f"{len(rest):,} more labels"
        lines[name] = [f"{sum(of[label] for label in rest):,}" for of in counts]
    return lines


def _units(split: LabelSplit | ChoiceSplit) -> int:
    """Examples, or tokens that have a label."""
    if isinstance(split, LabelSplit) and split.spec.task_type == "tokens":
        return sum(split.label_counts_by_name.values())
    return len(split.offsets) - 1


def _range(values: np.ndarray) -> str:
    return f"{values.min():g} to {values.max():g}" if len(values) else ""


def learnt_share(split: TokenSplit) -> float:
    """The learnt tokens among all."""
    return split.counts.label_tokens / max(1, split.counts.tokens)


def longest(split: TokenSplit) -> int:
    """Tokens of the longest example; of a pair, those of its longer document."""
    lengths = split.token_lengths
    if isinstance(split, PreferenceSplit | EmbeddingSplit):
        lengths = np.diff(split.offsets)
    return int(lengths.max(initial=0))


def print_counts(console: Console, task: Task) -> None:
    """A task's counts, one column for each split."""
    table = Table("", *splits_of(task), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, values in count_lines(task).items():
        table.add_row(in_cell(label), *map(in_cell, values))
    print_table(table, console)


def print_overview(console: Console, tasks: Mapping[str, Task]) -> None:
    """One line for each split of every task."""
    headings = ("task", "split", "rows", "used", "examples", "tokens", "learnt", "longest")
    table = Table(*headings, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, task in tasks.items():
        for line in _overview_lines(task):
            table.add_row(in_cell(name), *map(in_cell, line))
            name = ""
    print_table(table, console)


def _overview_lines(task: Task) -> Iterator[tuple[str, ...]]:
    for heading, split in splits_of(task).items():
        numbers = (split.counts.rows, _used(split), len(split), split.counts.tokens)
        share = f"{learnt_share(split):.0%}"
        if isinstance(split, LabelSplit):
            share = "label"
        yield heading, *(f"{number:,}" for number in numbers), share, f"{longest(split):,}"


def _used(split: TokenSplit) -> int:
    """Rows of which something is learnt."""
    counts = split.counts
    unusable = sum(len(paths) for paths in counts.unusable.values())
    return counts.rows - unusable - sum(getattr(counts, field) for field in LEFT_OUT)


def _if_any(splits: list[TokenSplit], labels: Mapping[str, str]) -> dict[str, list[int]]:
    """Label -> number of rows in each split, without the lines that are 0 everywhere."""
    numbers = {}
    for field, label in labels.items():
        values = [getattr(split.counts, field) for split in splits]
        if any(values):
            numbers[label] = values
    return numbers
