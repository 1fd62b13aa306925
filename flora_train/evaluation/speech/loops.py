"""Does a transcript repeat itself for ever? A phrase said again and again is cut after its first time."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, TIMES, LEAST = 24, 4, 16
"""A loop is a phrase of at most LONGEST tokens at the end of a text, TIMES or more in a row and LEAST tokens together."""


def loop_start(tokens: Sequence[int]) -> int | None:
    """Where a loop at the end of `tokens` begins to repeat (after the phrase's first time), or None."""
    for size in range(1, LONGEST + 1):
        times = max(TIMES, -(-LEAST // size))
        if len(tokens) < size * times:
            break
        phrase = tokens[-size:]
        if all(list(tokens[len(tokens) - size * (i + 1) : len(tokens) - size * i]) == list(phrase) for i in range(times)):
            start = len(tokens) - size
            while start >= size and list(tokens[start - size : start]) == list(phrase):
                start -= size
            return start + size
    return None
