"""Positions of tokens in a tokenized text by characters, proved by tokenizing its beginnings."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray

from flora_train.data.text_encoder import TextEncoder
from flora_train.data.token_cache import Encoded, Spans
from flora_train.data.tokenizer_copies import Place

SHORT, MOST_BEGINNINGS = 64, 256
"""Characters of a beginning whose tokens are kept, and how many are kept."""


class TokenPositions:
    """The tokens of a text by its characters.

    text, rows: as they were encoded (rows: spans of special tokens that are text); encoded: their tokens, or
    the first of them; beginnings: tokens of short texts of the template that were made before.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        text: str,
        rows: Spans,
        encoded: Encoded,
        beginnings: dict[tuple[Place, str], NDArray[np.int32]],
    ) -> None:
        self.encoder, self.text, self.rows, self.encoded = encoder, text, rows, encoded
        self.beginnings = beginnings
        self.count = len(encoded.ids)
        self._covered = encoded.bytes_before(self.count)

    def cut_before(self, character: int) -> bool:
        """Whether the tokens that were made end before a character."""
        return not self.encoded.whole and self._bytes(character) >= self._covered

    def exact(self, character: int) -> int | None:
        """The number of tokens before a character, if they are the tokens of the text before it alone; else
        None."""
        if character == 0:
            return 0
        if self.cut_before(character):
            return self.count
        if character == len(self.text) and self.encoded.whole:
            return self.count
        last = self._last_special(character)
        if last is not None:
            end, tokens = last
            rest = self._beginning(end, character)
            if _begins(self.encoded.ids[tokens:], rest) and self._is_at(tokens + len(rest), character):
                return tokens + len(rest)
        whole = self._beginning(0, character)
        if _begins(self.encoded.ids, whole) and self._is_at(len(whole), character):
            return len(whole)
        return None

    def covering(self, begin: int, end: int) -> tuple[int, int] | None:
        """The tokens that hold the characters begin:end, as transformers finds them; None if unknown.

        A token that holds characters before `begin`, too, is among them.
        """
        if self.encoder.is_slow:
            first, last = self.exact(begin), self.exact(end)
            return None if first is None or last is None else (first, last)
        if self.cut_before(begin):
            return self.count, self.count
        return self._before(begin), self.until(end)

    def until(self, character: int) -> int:
        """The fewest tokens that hold everything before a character, as transformers finds them.

        White space that is several tokens (as a line end is to SentencePiece) is held by the first.
        """
        if self.encoder.is_slow or self.cut_before(character):
            return self.count
        size = self._bytes(character)
        positions = range(self.count + 1)
        tokens = bisect_left(positions, size, key=self.encoded.bytes_before)
        last_with_it = bisect_right(positions, size, key=self.encoded.bytes_before) - 1
        if last_with_it > tokens and not self.text[character - 1].isspace():
            tokens = last_with_it
        return min(tokens, self.count)

    def after_special(self, begin: int, end: int) -> int | None:
        """The character after the last special token of the template in begin:end; None if there is none."""
        matches = [
            m for m in self.encoder.special_pattern.finditer(self.text, begin, end) if self._is_token(m)
        ]
        return matches[-1].end() if matches else None

    def text_of(self, token: int) -> str:
        """The text of the token at a position."""
        return str(self.encoder.tokenizer.decode([int(self.encoded.ids[token])]))

    def is_special(self, token: int) -> bool:
        """Whether the token at a position is special."""
        return 0 <= token < self.count and int(self.encoded.ids[token]) in self.encoder.special

    def _bytes(self, character: int) -> int:
        if self.text.isascii():
            return character
        return len(self.text[:character].encode())

    def _before(self, character: int) -> int:
        """The most tokens that end at or before a character."""
        return bisect_right(range(self.count + 1), self._bytes(character), key=self.encoded.bytes_before) - 1

    def _is_at(self, tokens: int, character: int) -> bool:
        """Whether tokens end at a character; special tokens may have taken white space after it, too."""
        if self.encoder.is_slow or self.is_special(tokens - 1):
            return True
        return self.encoded.bytes_before(tokens) == self._bytes(character)

    def _last_special(self, character: int) -> tuple[int, int] | None:
        """(its end, number of tokens up to it) of the last special token before a character."""
        if self.encoder.is_slow:
            return None
        for match in reversed(list(self.encoder.special_pattern.finditer(self.text, 0, character))):
            if not self._is_token(match):
                continue
            tokens = self._before(match.end())
            if self.is_special(tokens - 1) and self.encoded.bytes_before(tokens) == self._bytes(match.end()):
                return match.end(), tokens
            return None
        return None

    def _is_token(self, match: re.Match[str]) -> bool:
        """Whether what looks like a special token is one of the template, and not text of the row."""
        return self.encoder.special_tokens or not any(
            a < match.end() and b > match.start() for a, b in self.rows
        )

    def _beginning(self, begin: int, end: int) -> NDArray[np.int32]:
        """Tokens of the text begin:end, where special tokens of the template precede it or nothing does."""
        rows = tuple(
            (max(a, begin) - begin, min(b, end) - begin) for a, b in self.rows if a < end and b > begin
        )
        place: Place = "start" if begin == 0 else "token"
        text = self.text[begin:end]
        known = self.beginnings.get((place, text)) if not rows else None
        if known is not None:
            return known
        if self.encoder.is_slow and self.encoded.written and not self.encoder.special_tokens:
            return self.encoder.in_pieces(text, rows, place).ids  # as the whole was
        (encoded,) = self.encoder.encode([(text, rows)], place, more=True)
        if not rows and len(text) <= SHORT and len(self.beginnings) < MOST_BEGINNINGS:
            self.beginnings[place, text] = encoded.ids
        return encoded.ids


def _begins(ids: NDArray[np.int32], beginning: NDArray[np.int32]) -> bool:
    return len(beginning) <= len(ids) and bool(np.array_equal(ids[: len(beginning)], beginning))
