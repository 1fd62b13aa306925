"""Ends of Ruby and Perl functions: the first closing line that is indented as its signature.

Both languages are hard to tokenise (regular expressions, quoting operators), and published code is indented
well, so the indentation decides, and whatever does not fit is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .source_function import dedent, indentation


@dataclass(frozen=True)
class Block:
    """Lines `first`..`last` of a file, dedented into `lines`; `match` is that of the signature."""

    first: int
    last: int
    lines: list[str]
    match: re.Match[str]


def blocks(
    lines: list[str], kinds: list[str], signature: re.Pattern[str], closing: str, same_depth: re.Pattern[str]
) -> Iterator[Block]:
    """Blocks from a `signature` line (group 1: its margin) to the line `closing` at the same depth.

    A code line within that is not deeper must match `same_depth`, or the block is left out.
    """
    number = 0
    while number < len(lines):
        match = signature.match(lines[number]) if kinds[number] == "code" else None
        last = _closing_line(lines, kinds, number, closing, same_depth) if match else None
        if match is None or last is None:
            number += 1
            continue
        inside = lines[number : last + 1]
        dedented = dedent(inside, match[1])
        if dedented is not None and not {"documentation", "data"} & set(kinds[number : last + 1]):
            yield Block(number, last, dedented, match)
        number = last + 1


def _closing_line(
    lines: list[str], kinds: list[str], first: int, closing: str, same_depth: re.Pattern[str]
) -> int | None:
    """Number of the line that closes the block opened on line `first`."""
    depth = indentation(lines[first])
    for number in range(first + 1, len(lines)):
        text = lines[number].strip()
        if kinds[number] != "code" or not text or indentation(lines[number]) > depth:
            continue
        if indentation(lines[number]) == depth and text == closing:
            return number
        if indentation(lines[number]) < depth or not same_depth.match(text):
            return None
    return None
