"""TokenSplit: the tokenized documents of a split, the examples that they make up, and counts of its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from flora_train.runtime.atomic import write_atomically


@dataclass(frozen=True)
class SplitCounts:
    """Number of rows of a split by what happened to them.

    rows = used rows + unsampled + empty + over_long_dropped + prompt_too_long + unusable. Rows that
    validation_fraction moved to another split count there.
    """

    rows: int = 0
    unsampled: int = 0
    """Left out by max_examples."""
    empty: int = 0
    """Without text to learn."""
    over_long_truncated: int = 0
    """Longer than max_length and cut off at their end."""
    over_long_split: int = 0
    """Longer than max_length and divided into parts."""
    over_long_dropped: int = 0
    """Longer than max_length and left out."""
    prompt_too_long: int = 0
    """Left out because the prompt alone fills max_length."""
    documents: int = 0
    """Pieces of text that are learnt: more than the rows used where long ones are split."""
    examples: int = 0
    """Sequences made of the documents: fewer than documents where several are packed into one."""
    tokens: int = 0
    label_tokens: int = 0
    """Tokens that are learnt."""
    unusable: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Speech: reason -> the clips that were left out for it."""
    seconds: float = 0.0
    """Speech: duration of all clips used."""
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    """Special token -> number of times that it is written in rows (as text, unless the task has
    special_tokens: true)."""


@dataclass(frozen=True)
class TokenSplit:
    """Tokenized documents, one after the other, and the examples that they make up."""

    tokens: NDArray[np.int32]
    """int32 [sum of lengths]."""
    offsets: NDArray[np.int64]
    """int64 [m + 1]: positions in `tokens` at which the m documents begin, and the end."""
    prompt_lengths: NDArray[np.int32]
    """int32 [m]: tokens of each document that are read but not learnt."""
    label_bytes: NDArray[np.int64]
    """int64 [m]: UTF-8 bytes of the learnt text, for bits per byte. The end token has none."""
    pack_offsets: NDArray[np.int64]
    """int64 [n + 1]: example i holds the documents pack_offsets[i]:pack_offsets[i + 1], which do not attend
    to each other."""
    counts: SplitCounts

    def __len__(self) -> int:
        return len(self.pack_offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example."""
        return np.diff(self.offsets[self.pack_offsets])

    @property
    def label_counts(self) -> NDArray[np.int64]:
        """Learnt tokens per example. The first token of a document is not predicted."""
        return self._per_example(np.diff(self.offsets) - np.maximum(self.prompt_lengths, 1))

    @property
    def example_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of learnt text per example."""
        return self._per_example(self.label_bytes)

    @property
    def is_packed(self) -> bool:
        """Whether some example has several documents."""
        return len(self) < len(self.prompt_lengths)

    def window(self, index: int) -> int:
        """Encoder positions of an example, 0 for text."""
        return 0

    def example(self, index: int) -> NDArray[np.int32]:
        """Token ids of an example."""
        return self.tokens[
            self.offsets[self.pack_offsets[index]] : self.offsets[self.pack_offsets[index + 1]]
        ]

    def documents(self, index: int) -> list[tuple[NDArray[np.int32], int]]:
        """The documents of an example: tokens, and the length of the prompt among them."""
        documents = range(self.pack_offsets[index], self.pack_offsets[index + 1])
        return [
            (self.tokens[self.offsets[i] : self.offsets[i + 1]], int(self.prompt_lengths[i]))
            for i in documents
        ]

    def _per_example(self, per_document: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.diff(np.concatenate([[0], per_document.cumsum()])[self.pack_offsets])

    def save(self, path: Path) -> None:
        """Write the split atomically. Raises UserError if it cannot be written."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "counts"}
        counts = np.array(json.dumps(asdict(self.counts)))

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays, counts=counts)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path) as content:
            counts = SplitCounts(**json.loads(str(content["counts"])))
            arrays = {f.name: content[f.name] for f in fields(cls) if f.name != "counts"}
        return cls(**arrays, counts=counts)
