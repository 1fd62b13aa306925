"""PreferenceSplit: the tokens of preferences, two documents for a pair and one for a labelled completion."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from flora_train.data.token_split import TokenSplit


@dataclass(frozen=True)
class PreferenceSplit(TokenSplit):
    """A TokenSplit whose examples are pairs (a chosen and a rejected document) or labelled documents.

    Every document is a row of its own, with one learnt span. The documents of a pair begin with the same
    tokens, those of the prompt.
    """

    limit: int
    """Largest number of tokens of a document, training.max_length."""

    @property
    def is_paired(self) -> bool:
        """Whether the examples are pairs."""
        return not len(self.labels)

    @property
    def is_packed(self) -> bool:
        return False

    def size(self, index: int, document: int = 0, completion_of: int | None = None) -> int:
        """Tokens of a row. document and completion_of: see Row."""
        if completion_of is None:
            number = self._number(index, document)
            return int(self.offsets[number + 1] - self.offsets[number])
        rest = self.size(completion_of) - self._prompt_length(completion_of)
        return min(self._prompt_length(index) + rest, self.limit)

    def learnt(self, index: int, document: int = 0) -> int:
        """Learnt tokens of a document."""
        spans = self.learnt_spans(self._number(index, document))
        return int((spans[:, 1] - spans[:, 0]).sum())

    def learnt_counts(self, document: int) -> NDArray[np.int64]:
        """Learnt tokens of this document of every example, [n]."""
        learnt = np.concatenate([[0], (self.spans[:, 1] - self.spans[:, 0]).cumsum(dtype=np.int64)])
        return np.diff(learnt[self.span_offsets])[self.pack_offsets[:-1] + document]

    def learnt_bytes(self, document: int) -> NDArray[np.int64]:
        """UTF-8 bytes of the learnt text in this document of every example, [n]."""
        return self.label_bytes[self.pack_offsets[:-1] + document]

    def sequence(
        self, index: int, document: int = 0, completion_of: int | None = None
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """The one document of a row."""
        tokens, spans = self._document(self._number(index, document))
        if completion_of is None:
            return [(tokens, spans)]
        prompt = int(spans[0, 0])
        other, other_spans = self._document(self._number(completion_of, 0))
        mixed = np.concatenate([tokens[:prompt], other[other_spans[0, 0] :]])[: self.limit]
        moved = other_spans - other_spans[0, 0] + prompt
        return [(mixed, np.minimum(moved, len(mixed)))]

    def partner(self, index: int) -> int:
        """The example before this one. For the KL term, its completion follows this example's prompt where
        the reference was computed before training, and for held-out examples."""
        return (index - 1) % len(self)

    @property
    def kl_lengths(self) -> NDArray[np.int64]:
        """Tokens of every example's row for the KL term with its `partner`, [n]."""
        rest = np.diff(self.offsets) - self._prompt_lengths
        return np.minimum(self._prompt_lengths + np.roll(rest, 1), self.limit)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that can be made of these examples."""
        lengths = np.diff(self.offsets)
        longest = int(lengths.max(initial=0))
        if self.is_paired:
            return longest
        mixed = int(self._prompt_lengths.max(initial=0)) + int(
            (lengths - self._prompt_lengths).max(initial=0)
        )
        return max(longest, min(mixed, self.limit))

    @property
    def _prompt_lengths(self) -> NDArray[np.int64]:
        """Tokens before the completion of every document."""
        return self.spans[self.span_offsets[:-1], 0].astype(np.int64)

    def _prompt_length(self, index: int) -> int:
        return int(self.learnt_spans(self._number(index, 0))[0, 0])

    def _document(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return self.tokens[self.offsets[number] : self.offsets[number + 1]], self.learnt_spans(number)

    def _number(self, index: int, document: int) -> int:
        return int(self.pack_offsets[index]) + document


def preference_split(split: TokenSplit, max_length: int) -> PreferenceSplit:
    """The preferences that encoded documents make up: one for each label, or else one for every two
    documents."""
    documents = len(split.offsets) - 1
    pack_offsets = np.arange(documents + 1, dtype=np.int64)
    if not len(split.labels):
        pack_offsets = np.arange(0, documents + 1, 2, dtype=np.int64)
    content = {field.name: getattr(split, field.name) for field in fields(split)}
    content |= {
        "pack_offsets": pack_offsets,
        "counts": replace(split.counts, examples=len(pack_offsets) - 1),
    }
    return PreferenceSplit(**content, limit=max_length)
