"""TokenSplit: the tokenized documents of a split, the examples that they make up, and counts of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from flora_train.data.array_file import load_arrays, write_arrays


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
    """Left out because the prompt, or what precedes the first learnt turn, fills max_length."""
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
    spans: NDArray[np.int32]
    """int32 [s, 2]: begin and end of the learnt spans of all documents, as positions in the document, from 1
    on, because the first token of a document is not predicted."""
    span_offsets: NDArray[np.int64]
    """int64 [m + 1]: document j learns the spans span_offsets[j]:span_offsets[j + 1]."""
    label_bytes: NDArray[np.int64]
    """int64 [m]: UTF-8 bytes of the learnt text, for bits per byte. The end token has none."""
    pack_offsets: NDArray[np.int64]
    """int64 [n + 1]: example i holds the documents pack_offsets[i]:pack_offsets[i + 1], which do not attend
    to each other."""
    counts: SplitCounts
    labels: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=np.bool_), kw_only=True)
    """bool [n]: of unpaired preferences, whether each completion is good; else empty."""
    order: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64), kw_only=True)
    """int64 [m]: the documents in the order of the examples, where several are packed into one; else empty:
    they are stored in that order."""
    targets: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), kw_only=True)
    """float64 [t]: of labelled texts, what they are labelled with; else empty."""
    target_offsets: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(1, dtype=np.int64), kw_only=True
    )
    """int64 [m + 1]: document j is labelled with targets[target_offsets[j]:target_offsets[j + 1]]."""
    token_types: NDArray[np.int8] = field(default_factory=lambda: np.empty(0, dtype=np.int8), kw_only=True)
    """int8 [sum of lengths]: of labelled texts, the type of each token, where the tokenizer has types; else
    empty."""

    def __len__(self) -> int:
        return len(self.pack_offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example, with its `window`."""
        return self.token_lengths

    @property
    def token_lengths(self) -> NDArray[np.int64]:
        """Tokens per example."""
        return self._per_example(np.diff(self.offsets))

    @property
    def label_counts(self) -> NDArray[np.int64]:
        """Learnt tokens per example."""
        learnt = np.concatenate([[0], (self.spans[:, 1] - self.spans[:, 0]).cumsum(dtype=np.int64)])
        return self._per_example(np.diff(learnt[self.span_offsets]))

    def length(self, index: int) -> int:
        """Tokens of an example, with its `window`."""
        numbers = self.numbers(index)
        return int((self.offsets[numbers + 1] - self.offsets[numbers]).sum()) + self.window(index)

    def label_count(self, index: int) -> int:
        """Learnt tokens of an example."""
        spans = [self.learnt_spans(number) for number in self.numbers(index)]
        return int(sum((part[:, 1] - part[:, 0]).sum() for part in spans))

    @property
    def example_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of learnt text per example."""
        return self._per_example(self.label_bytes)

    @property
    def is_packed(self) -> bool:
        """Whether some example has several documents."""
        return len(self) < len(self.offsets) - 1

    def window(self, index: int) -> int:
        """Encoder positions of an example, 0 for text."""
        return 0

    def numbers(self, index: int) -> NDArray[np.int64]:
        """The documents of an example, by their place in `offsets`."""
        numbers = np.arange(self.pack_offsets[index], self.pack_offsets[index + 1])
        if len(self.order):
            return self.order[numbers]
        return numbers

    def example(self, index: int) -> NDArray[np.int32]:
        """Token ids of an example."""
        numbers = self.numbers(index)
        if len(numbers) == 1:
            return self.document_tokens(numbers[0])
        return np.concatenate([self.tokens[:0], *map(self.document_tokens, numbers)])

    def documents(self, index: int) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """The documents of an example: tokens [n], and the learnt spans [s, 2] among them."""
        return [(self.document_tokens(i), self.learnt_spans(i)) for i in self.numbers(index)]

    def document_tokens(self, document: int) -> NDArray[np.int32]:
        """Token ids of a document."""
        return self.tokens[self.offsets[document] : self.offsets[document + 1]]

    def learnt_spans(self, document: int) -> NDArray[np.int32]:
        """The learnt spans of a document, int32 [s, 2]."""
        return self.spans[self.span_offsets[document] : self.span_offsets[document + 1]]

    def sequence(
        self, index: int, document: int = 0, completion_of: int | None = None
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """The documents of one row of an example. document and completion_of: see Row; only preferences have
        them."""
        return self.documents(index)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, in memory or on disk."""
        return sum(array.nbytes for array in self._arrays().values())

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """Name -> array. Splits of other kinds have no arrays of their own."""
        return {f.name: getattr(self, f.name) for f in fields(TokenSplit) if f.name != "counts"}

    def _per_example(self, per_document: NDArray[np.int64]) -> NDArray[np.int64]:
        if len(self.order):
            per_document = per_document[self.order]
        return np.diff(np.concatenate([[0], per_document.cumsum()])[self.pack_offsets])

    def save(self, path: Path) -> None:
        """Write the split atomically. Raises UserError if it cannot be written."""
        write_arrays(path, self._arrays(), asdict(self.counts))

    @classmethod
    def load(cls, path: Path) -> Self:
        """The split in a file, memory-mapped. Raises OSError, ValueError or TypeError if it is missing or
        damaged."""
        arrays, counts = load_arrays(path)
        return cls(**arrays, counts=SplitCounts(**counts))


class LearntSpans(TypedDict):
    """The fields of a TokenSplit that tell what is learnt."""

    spans: NDArray[np.int32]
    span_offsets: NDArray[np.int64]


def spans_after(prompt_lengths: NDArray[Any], lengths: NDArray[Any]) -> LearntSpans:
    """`spans` and `span_offsets` of documents that are learnt from the end of a prompt to their own end.

    prompt_lengths, lengths: int [m], tokens of the prompts and of the whole documents.
    """
    begins = np.maximum(prompt_lengths, 1)
    spans = np.stack([begins, lengths], axis=1)[begins < lengths]
    span_offsets = np.concatenate([[0], np.cumsum(begins < lengths)])
    return LearntSpans(spans=spans.astype(np.int32), span_offsets=span_offsets.astype(np.int64))
