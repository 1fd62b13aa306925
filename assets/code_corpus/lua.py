"""Functions of Lua files: strings and comments are masked, block keywords counted."""

from __future__ import annotations

import re

from .source_function import KEYWORD_DEFINITION, SourceFunction, comment_above, dedent

COMMENT = "--"
RECEIVER = re.compile(r"\bself\b")
DEFINED_NAME = KEYWORD_DEFINITION

_OPAQUE = re.compile(
    r"--\[(?P<c>=*)\[.*?\](?P=c)\]|--[^\n]*|\[(?P<s>=*)\[.*?\](?P=s)\]"
    r"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'",
    re.DOTALL,
)
_SIGNATURE = re.compile(
    r"^([ \t]*)(?:local[ \t]+)?function[ \t]+([\w.:]+)[ \t]*\([^()\n]*\)[ \t]*$", re.MULTILINE
)
_BLOCK_WORD = re.compile(r"\b(function|do|if|repeat|end|until)\b")
_OPENERS = frozenset({"function", "do", "if", "repeat"})


def mask(source: str) -> str:
    """`source` with every string and comment blanked out; same length, same line ends."""
    return _OPAQUE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)


def functions(source: str) -> list[SourceFunction]:
    """Named functions that are not inside another one and whose signature and `end` stand alone on a line."""
    masked, lines, found = mask(source), source.split("\n"), []
    position = 0
    while match := _SIGNATURE.search(masked, position):
        end = _end_of_block(masked, match.end())
        if end is None:
            position = match.end()
            continue
        position = end
        first, last = source.count("\n", 0, match.start(2)), source.count("\n", 0, end)
        block = dedent(lines[first : last + 1], match[1])
        if block is None or block[-1] != "end" or source[match.start() : match.end()] != match[0]:
            continue
        name = re.split(r"[.:]", match[2])[-1]
        comment = "\n".join(comment_above(lines, first, COMMENT))
        found.append(SourceFunction(name, comment, block[0], "\n".join(block[1:-1]), block[-1]))
    return found


def code_only(source: str) -> str:
    """The file itself: Lua has no embedded documentation or data section."""
    return source


def _end_of_block(masked: str, start: int) -> int | None:
    """Offset after the `end` that closes the function whose body begins at `start`."""
    depth = 1
    for word in _BLOCK_WORD.finditer(masked, start):
        depth += 1 if word[1] in _OPENERS else -1
        if depth == 0:
            return word.end()
    return None
