"""The text of a row while its tokens arrive: it only grows, and ends with no part of a character."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from flora_train.data.text_encoder import TextEncoder

INCOMPLETE = "\ufffd"
"""What tokenizers write for bytes that are no character, or not yet."""


class TextStream:
    """The text of one row. stops: strings before the first of which it ends."""

    def __init__(self, encoder: TextEncoder, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.text = ""
        """The text so far."""
        self._encoder, self._prompt, self._stops = encoder, prompt, stops

    def update(self, tokens: Sequence[int]) -> str:
        """Read all tokens so far; returns the text that is new.

        It may be empty until the next tokens show which character, or whether a stop string, has begun.
        """
        text = self._encoder.decode_after(self._prompt, tokens).rstrip(INCOMPLETE)
        text = text[: _certain_length(text, self._stops)]
        if not text.startswith(self.text):  # the last tokens decode differently with those that follow
            return ""
        added = text[len(self.text) :]
        self.text = text
        return added

    def finish(self, text: str) -> str:
        """The rest of the row's whole text."""
        equal = takewhile(lambda pair: pair[0] == pair[1], zip(self.text, text, strict=False))
        shared = sum(1 for _ in equal)
        self.text = text
        return text[shared:]


def _certain_length(text: str, stops: Sequence[str]) -> int:
    """Characters before a stop string, or before what may be the begin of one."""
    certain = len(text)
    for stop in stops:
        if (position := text.find(stop)) >= 0:
            certain = min(certain, position)
        for length in range(1, len(stop)):
            if text.endswith(stop[:length]):
                certain = min(certain, len(text) - length)
    return certain
