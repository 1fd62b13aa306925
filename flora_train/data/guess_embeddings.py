"""Pairs and triplets of embeddings among the rows of a user's file, by their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flora_train.data.file_rows import Row
from flora_train.data.guess_labels import LABELS, NUMBERS

PAIRS = (
    ("anchor", "positive"),
    ("query", "positive"),
    ("query", "pos"),
    ("query", "passage"),
    ("query", "document"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
)
"""Columns of an anchor and of its positive. A question and its answer are a prompt and its completion."""
NEGATIVES = ("negative", "neg", "hard_negative")
LABELLED = frozenset((*LABELS, *NUMBERS, "is_duplicate", "relevance", "relevant"))
"""Columns that say of a pair whether its texts belong together: not all of them do."""


@dataclass(frozen=True)
class GuessedEmbeddings:
    """The keys of a task of embeddings."""

    keys: dict[str, str]
    used: tuple[str, ...]
    """Columns."""
    description: str


def guess_embeddings(rows: Sequence[Row]) -> GuessedEmbeddings | None:
    """Pairs of texts that belong together, and triplets if all rows have a negative; None for other rows."""
    if not rows:
        return None
    columns = {column for row in rows for column in row}
    pair = next((pair for pair in PAIRS if columns.issuperset(pair)), None)
    if pair is None or columns & LABELLED or not all(_are_texts(rows, column) for column in pair):
        return None
    anchor, positive = pair
    keys = {"anchor": anchor, "positive": positive}
    description = f"{len(rows):,} pairs, {positive} belongs to {anchor} (embeddings)"
    negative = next((name for name in NEGATIVES if name in columns and _are_texts(rows, name)), None)
    if negative is not None:
        keys["negative"] = negative
        description = (
            f"{len(rows):,} triplets, {positive} belongs to {anchor} and {negative} does not (embeddings)"
        )
    return GuessedEmbeddings(keys, tuple(keys.values()), description)


def _are_texts(rows: Sequence[Row], column: str) -> bool:
    return all(isinstance(row.get(column), str) and row[column].strip() for row in rows)
