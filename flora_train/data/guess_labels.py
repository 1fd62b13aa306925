"""Labelled texts among the rows of a user's file, by their columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flora_train.config.json_format import JsonValue
from flora_train.data.file_rows import Row
from flora_train.data.labels.cells import as_list, label_text, number

TEXTS = (
    "text",
    "sentence",
    "content",
    "review",
    "utterance",
    "comment",
    "message",
    "tweet",
    "document",
    "body",
    "description",
    "title",
)
"""Names of columns of texts that are labelled, the likeliest first."""
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
"""Columns of pairs of texts."""
LABELS = (
    "label",
    "labels",
    "class",
    "sentiment",
    "intent",
    "emotion",
    "category",
    "topic",
    "gold_label",
    "target",
)
"""Names of columns of labels, the likeliest first."""
NUMBERS = ("score", "rating", "stars", "similarity", *LABELS)
"""Names of columns of numbers for regression, the likeliest first."""
TOKENS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "pos_tags", "labels", "upos", "ner", "pos")
ROWS_PER_LABEL = 2
"""Rows that a label has on average at least."""
MOST_SHOWN = 10
"""Labels that a description names."""
FEWEST_NUMBERS = 20
"""Different whole numbers from which on a column is one of numbers, not of labels."""


@dataclass(frozen=True)
class GuessedLabels:
    """The keys of a task of labelled texts."""

    keys: dict[str, JsonValue]
    used: tuple[str, ...]
    """Columns."""
    description: str


def guess_labels(rows: Sequence[Row]) -> GuessedLabels | None:
    """Tagged tokens, or texts or pairs with labels or numbers; None for other rows."""
    if not rows:
        return None
    columns = list(dict.fromkeys(column for row in rows for column in row))
    tagged = _guess_tags(rows, columns)
    if tagged is not None:
        return tagged
    texts = next((pair for pair in PAIRS if set(pair) <= set(columns)), None)
    if texts is None:
        texts = next(((name,) for name in TEXTS if name in columns), None)  # type: ignore[assignment]
    if texts is None or not all(_is_text(row.get(column)) for row in rows for column in texts):
        return None
    for column in dict.fromkeys((*LABELS, *NUMBERS)):
        if column in columns and column not in texts:
            keys = _keys_of(rows, column)
            if keys is not None:
                return _of_texts(rows, texts, column, keys)
    return None


def _of_texts(
    rows: Sequence[Row], texts: tuple[str, ...], column: str, keys: dict[str, JsonValue]
) -> GuessedLabels:
    text: JsonValue = list(texts) if len(texts) > 1 else texts[0]
    named = " and ".join(texts)
    what = f"{len(rows):,} rows, of which {column} labels {named}"
    if keys.get("regression"):
        what = f"{len(rows):,} rows, {column} is a number that is predicted from {named}"
    elif keys.get("multi_label"):
        labels = [label_text(label) for row in rows for label in as_list(row.get(column)) or ()]
        what = f"{what} with any number of: {_counted(Counter(labels))}"
    else:
        what = f"{what}: {_counted(Counter(label_text(row.get(column)) for row in rows))}"
    return GuessedLabels({"text": text, "label": column, **keys}, (*texts, column), what)


def _guess_tags(rows: Sequence[Row], columns: Sequence[str]) -> GuessedLabels | None:
    tokens = next((name for name in TOKENS if name in columns), None)
    if tokens is None:
        return None
    for tags in TAGS:
        if tags in columns and all(_is_tagged(row.get(tokens), row.get(tags)) for row in rows):
            keys: dict[str, JsonValue] = {"text": tokens, "token_labels": tags}
            labels = Counter(label_text(label) for row in rows for label in _list(row.get(tags)) or ())
            what = f"{len(rows):,} rows, of which {tags} labels each of the {tokens}: {_counted(labels)}"
            return GuessedLabels(keys, (tokens, tags), what)
    return None


def _keys_of(rows: Sequence[Row], column: str) -> dict[str, JsonValue] | None:
    """Further keys of a column of labels; None for a column that holds none."""
    cells = [row.get(column) for row in rows]
    if column in LABELS and all(_list(cell) is not None for cell in cells):
        return {"multi_label": True}
    try:
        labels = Counter(label_text(cell) for cell in cells)
    except ValueError:
        return None
    if "" in labels:
        return None
    if column in NUMBERS and _are_numbers(cells, labels):
        return {"regression": True}
    if column in (*LABELS, *NUMBERS) and 2 <= len(labels) <= len(rows) / ROWS_PER_LABEL:
        return {}
    return None


def _are_numbers(cells: Sequence[Any], labels: Counter[str]) -> bool:
    """Whether cells are measured numbers, rather than the numbers of labels."""
    try:
        values = {number(cell) for cell in cells}
    except ValueError:
        return False
    return len(values) >= FEWEST_NUMBERS or any(not value.is_integer() for value in values)


def _is_tagged(tokens: Any, tags: Any) -> bool:
    words, labels = _list(tokens), _list(tags)
    return words is not None and labels is not None and len(words) == len(labels) > 0


def _list(cell: Any) -> list[Any] | None:
    try:
        return as_list(cell)
    except ValueError:
        return None


def _is_text(cell: Any) -> bool:
    return isinstance(cell, str) and bool(cell.strip())


def _counted(labels: Counter[str]) -> str:
    named = ", ".join(
        f"{' '.join(label.split())} {count:,}" for label, count in labels.most_common(MOST_SHOWN)
    )
    more = len(labels) - MOST_SHOWN
    return f"{named} and {more:,} more" if more > 0 else named
