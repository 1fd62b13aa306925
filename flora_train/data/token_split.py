"""TokenSplit: the tokenized documents of a split, the examples that they make up, and counts of its rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from flora_train.data.documents import EncodedExample
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

    def __len__(self) -> int:
        return len(self.pack_offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example."""
        return np.diff(self.offsets[self.pack_offsets])

    @property
    def label_counts(self) -> NDArray[np.int64]:
        """Learnt tokens per example."""
        learnt = np.concatenate([[0], (self.spans[:, 1] - self.spans[:, 0]).cumsum(dtype=np.int64)])
        return np.diff(learnt[self.span_offsets[self.pack_offsets]])

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

    def example(self, index: int) -> NDArray[np.int32]:
        """Token ids of an example."""
        return self.tokens[
            self.offsets[self.pack_offsets[index]] : self.offsets[self.pack_offsets[index + 1]]
        ]

    def documents(self, index: int) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """The documents of an example: tokens [n], and the learnt spans [s, 2] among them."""
        return [
            (self.tokens[self.offsets[i] : self.offsets[i + 1]], self.learnt_spans(i))
            for i in range(self.pack_offsets[index], self.pack_offsets[index + 1])
        ]

    def learnt_spans(self, document: int) -> NDArray[np.int32]:
        """The learnt spans of a document, int32 [s, 2]."""
        return self.spans[self.span_offsets[document] : self.span_offsets[document + 1]]

    def sequence(
        self, index: int, document: int = 0, completion_of: int | None = None
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """The documents of one row of an example. document and completion_of: see Row; only preferences have
        them."""
        return self.documents(index)

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


class SplitBuilder:
    """Builds a TokenSplit, whose examples are its documents, from encoded rows."""

    def __init__(self) -> None:
        self._tokens: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
        self._offsets = [0]
        self._spans: list[tuple[int, int]] = []
        self._span_offsets = [0]
        self._label_bytes: list[int] = []
        self._labels: list[bool] = []
        self._fates = Counter[str]()
        self._written = Counter[str]()

    def add(self, example: EncodedExample) -> None:
        """Append the documents of one row."""
        self._fates[example.fate] += 1
        self._written += example.special_tokens
        if example.documents and example.label is not None:
            self._labels.append(example.label)
        for document in example.documents:
            self._tokens.append(document.tokens)
            self._offsets.append(self._offsets[-1] + len(document.tokens))
            predicted = ((max(begin, 1), end) for begin, end in document.spans)
            self._spans += [(begin, end) for begin, end in predicted if begin < end]
            self._span_offsets.append(len(self._spans))
            self._label_bytes.append(document.label_bytes)

    def split(self, *, unsampled: int = 0) -> TokenSplit:
        """The split. unsampled: rows that were left out before they were encoded, for the counts."""
        fates, documents = self._fates, len(self._offsets) - 1
        spans = np.array(self._spans, dtype=np.int32).reshape(-1, 2)
        counts = SplitCounts(
            rows=fates.total() + unsampled,
            unsampled=unsampled,
            empty=fates["empty"],
            over_long_truncated=fates["truncate"],
            over_long_split=fates["split"],
            over_long_dropped=fates["drop"],
            prompt_too_long=fates["prompt_too_long"],
            documents=documents,
            examples=documents,
            tokens=self._offsets[-1],
            label_tokens=int((spans[:, 1] - spans[:, 0]).sum()),
            special_tokens=dict(self._written),
        )
        return TokenSplit(
            tokens=np.concatenate(self._tokens),
            offsets=np.array(self._offsets, dtype=np.int64),
            spans=spans,
            span_offsets=np.array(self._span_offsets, dtype=np.int64),
            label_bytes=np.array(self._label_bytes, dtype=np.int64),
            pack_offsets=np.arange(documents + 1, dtype=np.int64),
            counts=counts,
            labels=np.array(self._labels, dtype=np.bool_),
        )
