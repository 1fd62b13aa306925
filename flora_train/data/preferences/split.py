"""PreferenceSplit: the tokens of preferences, two documents for a pair and one for a labelled completion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flora_train.data.token_split import TokenSplit


@dataclass(frozen=True)
class PreferenceSplit(TokenSplit):
    """A TokenSplit whose examples are pairs (a chosen and a rejected document) or labelled documents.

    The documents of a pair begin with the same tokens, those of the prompt. Each is a row of its own.
    """

    labels: NDArray[np.bool_]
    """bool [n]: whether each completion is good; all true for pairs."""
    limit: NDArray[np.int64]
    """int64 []: largest number of tokens of a document, training.max_length."""

    @property
    def is_packed(self) -> bool:
        return False

    @property
    def is_paired(self) -> bool:
        """Whether the examples are pairs."""
        return len(self.offsets) - 1 == 2 * len(self)

    def size(self, index: int, document: int = 0, completion_of: int | None = None) -> int:
        """Tokens of a row."""
        if completion_of is None:
            number = self._number(index, document)
            return int(self.offsets[number + 1] - self.offsets[number])
        rest = self.size(completion_of) - self._prompt_length(completion_of)
        return min(self._prompt_length(index) + rest, int(self.limit))

    def learnt(self, index: int, document: int = 0) -> int:
        """Tokens of a document that are predicted and learnt."""
        return int(self.document_labels[self._number(index, document)])

    def learnt_of(self, document: int) -> NDArray[np.int64]:
        """Learnt tokens of this document of every example, [n]."""
        return self.document_labels[self.pack_offsets[:-1] + document]

    def bytes_of(self, document: int) -> NDArray[np.int64]:
        """UTF-8 bytes of the learnt text in this document of every example, [n]."""
        return self.label_bytes[self.pack_offsets[:-1] + document]

    @property
    def kl_lengths(self) -> NDArray[np.int64]:
        """Tokens of every example's row for the KL term, with its fixed partner, [n]."""
        return np.array([self.size(i, completion_of=self.partner(i)) for i in range(len(self))])

    def partner(self, index: int) -> int:
        """The example before this one, whose completion follows this one's prompt for the KL term where
        the partner cannot be of the same draw."""
        return (index - 1) % len(self)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that can be made of these examples."""
        lengths = np.diff(self.offsets)
        if self.is_paired or not len(lengths):
            return int(lengths.max(initial=0))
        prompts = np.array([self._prompt_length(i) for i in range(len(self))])
        mixed = int(prompts.max()) + int((lengths - prompts).max())
        return max(int(lengths.max()), min(mixed, int(self.limit)))

    @property
    def document_labels(self) -> NDArray[np.int64]:
        """Learnt tokens of every document."""
        return np.diff(self.offsets) - np.maximum(self.prompt_lengths, 1)

    def sequence(
        self, index: int, document: int = 0, completion_of: int | None = None
    ) -> list[tuple[NDArray[np.int32], int]]:
        """The one document of a row."""
        tokens, prompt = self._document(self._number(index, document))
        if completion_of is None:
            return [(tokens, prompt)]
        other, other_prompt = self._document(self._number(completion_of, 0))
        mixed = np.concatenate([tokens[:prompt], other[other_prompt:]])
        return [(mixed[: int(self.limit)], prompt)]

    def _document(self, number: int) -> tuple[NDArray[np.int32], int]:
        begin, end = self.offsets[number : number + 2]
        return self.tokens[begin:end], int(self.prompt_lengths[number])

    def _prompt_length(self, index: int) -> int:
        return int(self.prompt_lengths[self._number(index, 0)])

    def _number(self, index: int, document: int) -> int:
        return int(self.pack_offsets[index]) + document
