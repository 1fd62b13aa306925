"""Tokens of long texts, made in windows and no more of them than are used."""

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
"""Spans of a text, in characters, ascending."""
LONGEST_WHOLE = 1 << 20
"""Characters of the longest text that is tokenized in one call: tokenizers need more than a hundred bytes for
each."""
WINDOW = 1 << 16
"""Characters of the windows in which longer texts are tokenized."""
CHARACTERS_A_TOKEN = 32
"""Characters per token up to which a text is tokenized in one call if only its first tokens are used."""
BETWEEN_WORDS = re.compile(r"\w(?= \w)")
"""Places at which a text can be cut without changing its tokens."""
SEEN_FOR_A_CUT = 4096
"""Last characters of a window that are searched for such a place."""


def longest_whole(limit: int | None) -> int:
    """Characters of the longest text that is tokenized in one call if only its first `limit` tokens are used
    (None: all)."""
    return LONGEST_WHOLE if limit is None else min(LONGEST_WHOLE, max(WINDOW, CHARACTERS_A_TOKEN * limit))


@dataclass(frozen=True)
class Encoded:
    """A tokenized text."""

    ids: NDArray[np.int32]
    """int32 [n]."""
    bytes_before: Callable[[int], int]
    """n -> UTF-8 bytes of the text that the first n tokens cover."""
    written: Counter[str]
    """Special token -> number of times that it is written in rows."""
    whole: bool = True
    """Whether the text ends with the last id. False if only its first tokens were requested."""


def between(rows: Spans, length: int) -> Iterator[tuple[int, int]]:
    """The parts of a text between the spans."""
    end = 0
    for a, b in [*rows, (length, length)]:
        if a > end:
            yield end, a
        end = max(end, b)


def windows(text: str, rows: Spans) -> Iterator[tuple[int, int]]:
    """Windows of at most WINDOW characters, cut between words if possible, and never within the text of a
    template."""
    begin = 0
    while begin < len(text):
        end = begin + WINDOW
        if end < len(text):
            near = [match.end() for match in BETWEEN_WORDS.finditer(text, end - SEEN_FOR_A_CUT, end)]
            end = near[-1] if near else end
            literal = next(
                (a for a, b in between(rows, len(text)) if a < end < b and b - a < SEEN_FOR_A_CUT), end
            )
            end = literal if literal > begin else end
        yield begin, min(end, len(text))
        begin = end


def joined(parts: Sequence[Encoded], whole: bool) -> Encoded:
    """The tokens of one text from those of its windows."""
    ends = [0, *accumulate(len(part.ids) for part in parts)]
    sizes = [0, *accumulate(part.bytes_before(len(part.ids)) for part in parts)]

    def bytes_before(n: int) -> int:
        part = max(0, min(bisect_right(ends, n) - 1, len(parts) - 1))
        return sizes[part] + parts[part].bytes_before(n - ends[part])

    written = sum((part.written for part in parts), Counter[str]())
    return Encoded(np.concatenate([part.ids for part in parts]), bytes_before, written, whole)


class Utf8:
    """UTF-8 lengths of the beginnings of a text, fast if they are requested in ascending order."""

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
    """The number of UTF-8 bytes of `text` that its first n tokens cover. A character that tokens share counts
    with the first."""
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
    """The same as `byte_counter`, from the end of each token in characters. It keeps 4 bytes per token, and
    not the text."""
    characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (characters > 0x7F).astype(np.int32) + (characters > 0x7FF) + (characters > 0xFFFF)
    before = np.concatenate([[0], sizes.cumsum()]).astype(np.int32)
    covered = before[-1:]
    if len(ends):
        positions = np.concatenate([[0], np.minimum(ends[:-1], len(text)), [len(text)]])
        covered = before[positions.astype(np.int64)]
    return lambda n: int(covered[max(0, min(n, len(covered) - 1))])
