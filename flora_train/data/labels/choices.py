"""ChoiceSplit: prompts with the word of their label, which can be scored with the words of all labels."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from flora_train.data.labels.verbalizer import WORD_PLACES, LabelWords
from flora_train.data.token_split import TokenSplit

OWN_WORD = 0
"""The document of an example with the word of its label, and the end token: what is learnt. Document n + 1
has the word of label n alone."""


@dataclass(frozen=True)
class ChoiceSplit(TokenSplit):
    """A TokenSplit of prompts and words, whose examples have a label."""

    words: LabelWords

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.words.labels

    @property
    def label_counts_by_name(self) -> dict[str, int]:
        """Label -> number of examples that have it."""
        counts = np.bincount(self.references, minlength=len(self.label_names))
        return {label: int(count) for label, count in zip(self.label_names, counts, strict=True)}

    @property
    def references(self) -> NDArray[np.int64]:
        """int64 [m]: the number of the label of each document."""
        return np.asarray(self.targets)[0::2].astype(np.int64)

    def choice_length(self, index: int, label: int) -> int:
        """Tokens of an example with the word of a label."""
        return self._prompt_length(index) + len(self._words(index)[label])

    def sequence(
        self, index: int, document: int = OWN_WORD, completion_of: int | None = None
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """The documents of an example; with document n + 1, its prompt and the word of label n, which is
        scored."""
        if document == OWN_WORD:
            return self.documents(index)
        prompt = self._prompt_length(index)
        (number,) = self.numbers(index)
        word = self._words(index)[document - 1]
        tokens = np.concatenate([self.document_tokens(number)[:prompt], word])
        return [(tokens, np.array([[prompt, len(tokens)]], dtype=np.int32))]

    def _prompt_length(self, index: int) -> int:
        (number,) = self.numbers(index)
        return int(self.learnt_spans(number)[0, 0])

    def _words(self, index: int) -> tuple[NDArray[np.int32], ...]:
        (number,) = self.numbers(index)
        return self.words.tokens(WORD_PLACES[int(self.targets[2 * number + 1])])


def choice_split(split: TokenSplit, words: LabelWords) -> ChoiceSplit:
    """The prompts and words that encoded documents are."""
    content = {field.name: getattr(split, field.name) for field in fields(TokenSplit)}
    return ChoiceSplit(**content, words=words)
