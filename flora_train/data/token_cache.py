"""The tokens of a text that may be long: made in windows of it, no more of them than are used."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = Sequence[int] | NDArray[np.int32]
Spans = Sequence[tuple[int, int]]
"""Parts of a text, in its characters, ascending."""
LONGEST_WHOLE = 1 << 20
"""Characters of the longest text that is tokenised at once: tokenizers take more than a hundred bytes for each."""
WINDOW = 1 << 16
"""Characters of the parts in which longer texts are tokenised."""
CHARACTERS_A_TOKEN = 32
"""Where only the first tokens of a text are used, it is tokenised at once up to so many characters for each of them."""
BETWEEN_WORDS = re.compile(r"\w(?= \w)")
"""Where a text can be cut without any change of its tokens."""
SEEN_FOR_A_CUT = 4096
"""Last characters of a window that are searched for such a place."""


def longest_whole(limit: int | None) -> int:
    """Characters of the longest text that is tokenised at once, where only its first `limit` tokens are used (None: all)."""
    return LONGEST_WHOLE if limit is None else min(LONGEST_WHOLE, max(WINDOW, CHARACTERS_A_TOKEN * limit))


@dataclass(frozen=True)
class Encoded:
    """ids: int32 [n]; bytes_before: n -> UTF-8 bytes of the text that the first n tokens cover; written: special token -> how often
    it is written in rows; whole: whether the text ends where the ids end (False: it has more than were asked for)."""

    ids: NDArray[np.int32]
    bytes_before: Callable[[int], int]
    written: Counter[str]
    whole: bool = True


def between(rows: Spans, length: int) -> Iterator[tuple[int, int]]:
    """What lies between the spans."""
    end = 0
    for a, b in [*rows, (length, length)]:
        if a > end:
            yield end, a
        end = max(end, b)


def windows(text: str, rows: Spans) -> Iterator[tuple[int, int]]:
    """Parts of at most WINDOW characters, cut between words where that is possible, and never inside a template's text."""
    begin = 0
    while begin < len(text):
        end = begin + WINDOW
        if end < len(text):
            near = [found.end() for found in BETWEEN_WORDS.finditer(text, end - SEEN_FOR_A_CUT, end)]
            end = near[-1] if near else end
            literal = next((a for a, b in between(rows, len(text)) if a < end < b and b - a < SEEN_FOR_A_CUT), end)
            end = literal if literal > begin else end
        yield begin, min(end, len(text))
        begin = end


def joined(parts: Sequence[Encoded], whole: bool) -> Encoded:
    """The windows of one text."""
    ends = [0, *accumulate(len(part.ids) for part in parts)]
    sizes = [0, *accumulate(part.bytes_before(len(part.ids)) for part in parts)]

    def bytes_before(n: int) -> int:
        part = max(0, min(bisect_right(ends, n) - 1, len(parts) - 1))
        return sizes[part] + parts[part].bytes_before(n - ends[part])

    written = sum((part.written for part in parts), Counter[str]())
    return Encoded(np.concatenate([part.ids for part in parts]), bytes_before, written, whole)


class Utf8:
    """UTF-8 lengths of the beginnings of a text, quick where they are asked for in ascending order."""

    def __init__(self, text: str) -> None:
        self.text, self.ascii = text, text.isascii()
        self.known = (0, 0)

    def __call__(self, characters: int) -> int:
        if self.ascii:
            return min(characters, len(self.text))
        at, size = self.known if self.known[0] <= characters else (0, 0)
        self.known = (characters, size + len(self.text[at:characters].encode()))
        return self.known[1]


def byte_counter(tokenizer: Any, text: str, ids: Sequence[int], encoding: Any) -> Callable[[int], int]:
    """How many UTF-8 bytes of `text` do its first n tokens cover? A character that tokens share counts with the first."""
    if encoding is not None and len(text) >= WINDOW // 2:
        return counter_of_ends(text, [end for _, end in encoding.offsets])
    utf8 = Utf8(text)

    def bytes_before(n: int) -> int:
        if n >= len(ids):
            return utf8(len(text))
        if n <= 0:
            return 0
        if encoding is not None:
            return utf8(encoding.token_to_chars(n - 1)[1])
        return len(tokenizer.decode(ids[:n]).rstrip("\ufffd").encode())  # a slow tokenizer has no offsets

    return bytes_before


def counter_of_ends(text: str, ends: Sequence[int]) -> Callable[[int], int]:
    """The same from where each token ends, in characters. Of a long text it keeps 4 bytes a token, and not the text."""
    characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (characters > 0x7F).astype(np.int32) + (characters > 0x7FF) + (characters > 0xFFFF)
    before = np.concatenate([[0], sizes.cumsum()]).astype(np.int32)
    found = (
        before[np.concatenate([[0], np.minimum(ends[:-1], len(text)), [len(text)]]).astype(np.int64)]
        if len(ends)
        else before[-1:]
    )
    return lambda n: int(found[max(0, min(n, len(found) - 1))])
