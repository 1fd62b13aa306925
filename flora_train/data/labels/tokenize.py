"""Tokenizes labelled texts as the tokenizer itself does, with its special tokens and token types."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import user_error
from flora_train.data.labels.reader import LabelledRow
from flora_train.data.text_encoder import TextEncoder

Text: TypeAlias = str | list[str]
LONGEST_TEXT_FACTOR = 32
"""Characters per token of max_length up to which a long text is read."""
SHORTEST_CUT = 1 << 16
"""Characters of a text up to which it is always read."""


@dataclass(frozen=True)
class TokenizedText:
    """A text or a pair of texts, or the tokens of a tagged text."""

    tokens: NDArray[np.int32]
    types: NDArray[np.int8] | None
    """The types of the tokens; None if the tokenizer has none."""
    words: tuple[int | None, ...]
    """Of a tagged text: for each token the word that begins with it, else None."""
    over_long: bool
    special_tokens: Counter[str]
    """Special token -> number of times that it is written in the text."""


class LabelledTextTokenizer:
    """Tokenizes texts with the special tokens of the tokenizer, cut to max_length.

    special_tokens: special tokens that are written in rows are tokens, not text. Raises UserError if
    max_length has no room for a text.
    """

    def __init__(self, tokenizer: Any, max_length: int, *, special_tokens: bool, is_tagging: bool) -> None:
        # a copy, because truncation is a state of a fast tokenizer, of which the hash of tokens is made
        self.tokenizer = copy.deepcopy(tokenizer)
        self.max_length, self.special_tokens = max_length, special_tokens
        self.pattern = TextEncoder(self.tokenizer).special_pattern
        self.has_types = "token_type_ids" in self.tokenizer.model_input_names
        if is_tagging and not self.tokenizer.is_fast:
            hint = "has a slow tokenizer, and token_labels needs a fast one, which tells the tokens of words"
            raise user_error("model.path", tokenizer.name_or_path, hint)
        self.spaces_words = is_tagging and self._joins_words()

    def __call__(self, rows: Sequence[LabelledRow], *, is_tagging: bool) -> list[TokenizedText]:
        """The tokens of each row."""
        texts = [self._shortened(row.texts, is_tagging) for row in rows]
        encoded = self._encode(texts, is_tagging, truncation=False)
        whole = [self._whole(row.texts, is_tagging) for row in rows]
        fits = [len(ids) <= self.max_length for ids in encoded["input_ids"]]
        if any(fits[i] and texts[i] != whole[i] for i in range(len(rows))):
            # many characters of few tokens, such as white space
            texts = whole
            encoded = self._encode(texts, is_tagging, truncation=False)
            fits = [len(ids) <= self.max_length for ids in encoded["input_ids"]]
        over_long = [i for i, is_whole in enumerate(fits) if not is_whole]
        cut = None
        if over_long:
            cut = self._encode([texts[i] for i in over_long], is_tagging, truncation="longest_first")
        results = []
        for i, row in enumerate(rows):
            source, place = encoded, i
            if cut is not None and not fits[i]:
                source, place = cut, over_long.index(i)
            results.append(self._result(source, place, row, is_tagging=is_tagging, over_long=not fits[i]))
        return results

    def check_room(self, texts: int) -> None:
        """Raises UserError if special tokens fill max_length. texts: 2 for pairs."""
        special = self.tokenizer.num_special_tokens_to_add(pair=texts > 1)
        if special + texts > self.max_length:
            hint = f"has no room for a text beside {special} special tokens: raise it to {special + texts}"
            raise user_error("training.max_length", self.max_length, hint)

    @property
    def separates_pairs(self) -> bool:
        """Whether the tokenizer writes a special token between the texts of a pair, or tells them apart by
        their types."""
        if self.has_types:
            return True
        single = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        pair = self.tokenizer("a", "a", add_special_tokens=True)["input_ids"]
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return len(pair) > len(single) + len(plain)

    def _encode(
        self,
        texts: Sequence[tuple[Text, ...]],
        is_tagging: bool,
        *,
        truncation: Literal["longest_first", False],
    ) -> Any:
        second = None
        if len(texts[0]) > 1:
            second = [text[1] for text in texts]
        limit = self.max_length if truncation else None
        return self.tokenizer(
            [text[0] for text in texts],
            second,
            truncation=truncation,
            max_length=limit,
            is_split_into_words=is_tagging,
            return_attention_mask=False,
            return_token_type_ids=self.has_types,
            split_special_tokens=not self.special_tokens,
            verbose=False,
        )

    def _result(
        self, encoded: Any, place: int, row: LabelledRow, *, is_tagging: bool, over_long: bool
    ) -> TokenizedText:
        types = None
        if self.has_types:
            types = np.array(encoded["token_type_ids"][place], dtype=np.int8)
        words: tuple[int | None, ...] = ()
        if is_tagging:
            words = _first_tokens(encoded.word_ids(place))
        tokens = np.array(encoded["input_ids"][place], dtype=np.int32)
        written = Counter(found for text in row.texts for found in self.pattern.findall(text))
        return TokenizedText(tokens, types, words, over_long, written)

    def _shortened(self, texts: tuple[str, ...], is_tagging: bool) -> tuple[Text, ...]:
        """Texts without most of an end that is cut off anyway: tokenizers need much memory for long texts."""
        if is_tagging:
            return self._whole(texts[: self.max_length + 1], is_tagging)
        longest = max(SHORTEST_CUT, LONGEST_TEXT_FACTOR * self.max_length)
        return tuple(text[:longest] for text in texts)

    def _whole(self, texts: tuple[str, ...], is_tagging: bool) -> tuple[Text, ...]:
        """The arguments of the tokenizer for the texts of a row."""
        if not is_tagging:
            return texts
        words = list(texts)
        if self.spaces_words:
            words = [f" {word}" for word in words]
        return (words,)

    def _joins_words(self) -> bool:
        """Whether the tokenizer reads the words of a list as if no space stood between them."""
        try:
            listed = self.tokenizer([["a", "a"]], is_split_into_words=True, add_special_tokens=False)
            spaced = self.tokenizer([[" a", " a"]], is_split_into_words=True, add_special_tokens=False)
            whole = self.tokenizer(["a a", " a a"], add_special_tokens=False)
        except (AssertionError, ValueError):  # of tokenizers that need add_prefix_space=True for lists
            return True
        without, with_space = whole["input_ids"]
        return listed["input_ids"][0] != without and spaced["input_ids"][0] == with_space


def _first_tokens(word_ids: Sequence[int | None]) -> tuple[int | None, ...]:
    """For each token the word that begins with it, else None."""
    first: list[int | None] = []
    before: int | None = None
    for word in word_ids:
        begins = word is not None and word != before
        first.append(word if begins else None)
        before = word
    return tuple(first)
