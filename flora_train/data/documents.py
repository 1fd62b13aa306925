"""Rows with their place in a file, and what they become: tokenized documents with learnt spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flora_train.config.json_format import JsonObject
from flora_train.data.file_rows import Row

Fate: TypeAlias = Literal["whole", "truncate", "split", "drop", "prompt_too_long", "empty"]
"""What happened to a row: used as it is, cut off, divided into parts, or left out because it is over-long,
its prompt fills training.max_length, or it has no text to learn."""
Spans: TypeAlias = Sequence[tuple[int, int]]
"""(begin, end) positions of tokens, ascending, not touching each other."""


@dataclass(frozen=True)
class LocatedRow:
    """A row of a source."""

    cells: Row
    """Column -> value."""
    file: str
    """Name of its file or data set."""
    number: int
    """From 1; the line, where rows are lines of a file."""

    @property
    def where(self) -> str:
        """The row's place, for errors: `chats.jsonl, row 17`."""
        return f"{PurePath(self.file).name}, row {self.number}"


@dataclass(frozen=True)
class RowsOutline:
    """What is known of the rows of a split before they are tokenized."""

    columns: tuple[str, ...]
    """Of all rows, in the order in which they first occur."""
    first: LocatedRow | None


def outline(rows: Iterable[LocatedRow]) -> RowsOutline:
    """The outline of rows."""
    columns: dict[str, None] = {}
    first: LocatedRow | None = None
    for row in rows:
        columns |= dict.fromkeys(map(str, row.cells))
        first = first or row
    return RowsOutline(tuple(columns), first)


@dataclass(frozen=True)
class EncodedDocument:
    """A sequence of tokens that the model reads from its first position on."""

    tokens: NDArray[np.int32]
    """int32 [n]."""
    spans: Spans
    """The tokens that are learnt. The first token of a document is never predicted."""
    label_bytes: int
    """UTF-8 bytes of the learnt text, for bits per byte. The end token has none."""
    types: NDArray[np.int8] | None = None
    """int8 [n]: the types of the tokens of a labelled text; None if the tokenizer has none."""


@dataclass(frozen=True)
class EncodedExample:
    """A tokenized row."""

    documents: tuple[EncodedDocument, ...]
    """Empty if the row is left out."""
    fate: Fate
    special_tokens: Counter[str] = field(default_factory=Counter)
    """Special token -> number of times that it is written in the row."""
    label: bool | None = None
    """Of an unpaired preference: whether the completion is desirable."""
    target: tuple[float, ...] = ()
    """Of a labelled text: what it is labelled with, see `LabelSplit.target`."""


class RowEncoder(Protocol):
    """Tokenizes the rows of one task."""

    @property
    def setting(self) -> JsonObject:
        """Everything but the tokenizer that tokens depend on, for the key of the cache."""
        ...

    def check(self, rows: RowsOutline, split: str) -> None:
        """Raises UserError if a column is missing. split: name of the rows, such as `validation`."""
        ...

    def encode(self, rows: Sequence[LocatedRow]) -> Iterator[EncodedExample]:
        """One example for each row, in their order. Raises UserError that names a row that is unusable."""
        ...
