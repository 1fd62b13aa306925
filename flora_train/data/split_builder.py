"""Builds a TokenSplit from encoded rows, in memory or in a file that grows."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from flora_train.data.array_file import ArrayWriter
from flora_train.data.documents import EncodedExample
from flora_train.data.token_split import SplitCounts, TokenSplit

TYPES: dict[str, tuple[DTypeLike, tuple[int, ...]]] = {
    "tokens": (np.int32, ()),
    "offsets": (np.int64, ()),
    "spans": (np.int32, (2,)),
    "span_offsets": (np.int64, ()),
    "label_bytes": (np.int64, ()),
    "pack_offsets": (np.int64, ()),
    "labels": (np.bool_, ()),
    "order": (np.int64, ()),
    "targets": (np.float64, ()),
    "target_offsets": (np.int64, ()),
    "token_types": (np.int8, ()),
}
"""The arrays of a split: type and shape of their items. The largest is the first."""
DOCUMENTS = 1024
"""Documents that are written at once."""


class SplitBuilder:
    """Builds a TokenSplit, whose examples are its documents, from encoded rows. Use it as a context, at whose
    end nothing unfinished remains.

    path: where the split is kept; None for a split in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._file = ArrayWriter(path, TYPES)
        self._file.append(**{name: np.zeros(1, np.int64) for name in OFFSETS})
        self._tokens: list[NDArray[np.int32]] = []
        self._spans: list[tuple[int, int]] = []
        self._span_counts: list[int] = []
        self._label_bytes: list[int] = []
        self._labels: list[bool] = []
        self._targets: list[float] = []
        self._target_counts: list[int] = []
        self._types: list[NDArray[np.int8]] = []
        self._total, self._documents, self._learnt, self._total_spans = 0, 0, 0, 0
        self._total_targets = 0
        self._fates = Counter[str]()
        self._written = Counter[str]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    @property
    def bytes_so_far(self) -> int:
        """Bytes of the arrays."""
        return self._file.size + sum(tokens.nbytes for tokens in self._tokens)

    def add(self, example: EncodedExample) -> None:
        """Append the documents of one row. Raises UserError if the disk is full."""
        self._fates[example.fate] += 1
        if example.special_tokens:
            self._written += example.special_tokens
        if example.documents and example.label is not None:
            self._labels.append(example.label)
        for document in example.documents:
            self._tokens.append(document.tokens)
            before = len(self._spans)
            for begin, end in document.spans:
                if (begin or 1) < end:
                    self._spans.append((begin or 1, end))
            self._span_counts.append(len(self._spans) - before)
            self._label_bytes.append(document.label_bytes)
            self._targets += example.target
            self._target_counts.append(len(example.target))
            if document.types is not None:
                self._types.append(document.types)
        if len(self._tokens) >= DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        """Write the documents that were added last."""
        documents = len(self._tokens)
        if not documents and not self._labels:
            return
        lengths = np.array([len(tokens) for tokens in self._tokens], dtype=np.int64)
        spans = np.array(self._spans, dtype=np.int32).reshape(-1, 2)
        numbers = np.arange(self._documents + 1, self._documents + documents + 1, dtype=np.int64)
        self._file.append(
            tokens=np.concatenate([np.empty(0, dtype=np.int32), *self._tokens]),
            offsets=self._total + lengths.cumsum(),
            spans=spans,
            span_offsets=self._total_spans + np.cumsum(self._span_counts, dtype=np.int64),
            label_bytes=np.array(self._label_bytes, dtype=np.int64),
            pack_offsets=numbers,
            labels=np.array(self._labels, dtype=np.bool_),
            targets=np.array(self._targets, dtype=np.float64),
            target_offsets=self._total_targets + np.cumsum(self._target_counts, dtype=np.int64),
            token_types=np.concatenate([np.empty(0, dtype=np.int8), *self._types]),
        )
        self._total_targets += len(self._targets)
        self._total += int(lengths.sum())
        self._documents += documents
        self._total_spans += len(spans)
        self._learnt += int((spans[:, 1] - spans[:, 0]).sum())
        self._tokens, self._spans, self._span_counts = [], [], []
        self._label_bytes, self._labels = [], []
        self._targets, self._target_counts, self._types = [], [], []

    def split(self, *, unsampled: int = 0) -> TokenSplit:
        """The split, published at its path. unsampled: rows that were left out before they were encoded, for
        the counts."""
        self._flush()
        fates = self._fates
        counts = SplitCounts(
            rows=fates.total() + unsampled,
            unsampled=unsampled,
            empty=fates["empty"],
            over_long_truncated=fates["truncate"],
            over_long_split=fates["split"],
            over_long_dropped=fates["drop"],
            prompt_too_long=fates["prompt_too_long"],
            documents=self._documents,
            examples=self._documents,
            tokens=self._total,
            label_tokens=self._learnt,
            special_tokens=dict(self._written),
        )
        arrays: dict[str, Any] = self._file.finish(asdict(counts))
        return TokenSplit(**arrays, counts=counts)


OFFSETS = ("offsets", "span_offsets", "pack_offsets", "target_offsets")
"""Arrays that begin with a zero."""
