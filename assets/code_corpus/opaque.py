"""Masks comments, strings and patterns in source code of languages with braces."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

BLOCK_COMMENT = r"/\*.*?\*/"
LINE_COMMENT = r"//[^\n]*"
DOUBLE_QUOTED = r'"(?:\\.|[^"\\])*"'
DOUBLE_QUOTED_LINE = r'"(?:\\.|[^"\\\n])*"'
SINGLE_QUOTED = r"'(?:\\.|[^'\\])*'"
SINGLE_QUOTED_LINE = r"'(?:\\.|[^'\\\n])*'"
CHARACTER = r"'(?:\\[^'\n]+|\\'|[^'\\\n])'"
BACK_QUOTED = r"`[^`]*`"

# after these a `/` begins a regular expression, elsewhere it divides
_BEFORE_PATTERN = re.compile(
    r"(?:^|[(,=:\[!&|?{};+\-*%<>~^]|\b(?:return|typeof|case|in|of|do|else|void|delete|throw|new|yield|await))$"
)
_PATTERN = r"/(?![*/])(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n\[])+/[a-z]*"
_TEMPLATE_PART = re.compile(r"\\.|`|\$\{", re.DOTALL)


@dataclass(frozen=True)
class Opaque:
    """What a language writes that is not code."""

    comments: tuple[str, ...]
    """Patterns of whole comments."""

    strings: tuple[str, ...]
    """Patterns of whole literals; one may be used as both ends of a document that embeds the language."""

    nested_comment: tuple[str, str] | None = None
    """Opener and closer of comments that may hold comments."""

    javascript: bool = False
    """Whether there are regular expressions between slashes and templates with `${...}`."""

    @cached_property
    def token(self) -> re.Pattern[str]:
        """Matches the next thing that is not code, or only the beginning of one that nests."""
        parts = [f"(?P<nested>{re.escape(self.nested_comment[0])})"] if self.nested_comment else []
        parts += [
            "(?P<comment>" + "|".join(self.comments) + ")",
            "(?P<string>" + "|".join(self.strings) + ")",
        ]
        if self.javascript:
            parts += ["(?P<template>`)", f"(?P<pattern>{_PATTERN})"]
        return re.compile("|".join(parts), re.DOTALL | re.MULTILINE)


def mask(source: str, opaque: Opaque) -> str:
    """`source` with everything that is not code replaced by blanks; same length, same line ends."""
    parts: list[str] = []
    position, before = 0, ""
    start = 0
    while match := opaque.token.search(source, start):
        before = source[position : match.start()].rstrip()[-12:] or before
        if match.lastgroup == "pattern" and not _BEFORE_PATTERN.search(before):
            start = match.start() + 1
            continue
        end = _end_of_token(source, match, opaque)
        parts += [source[position : match.start()], re.sub(r"[^\n]", " ", source[match.start() : end])]
        before = before if match.lastgroup in ("comment", "nested") else '"'
        position = start = end
    return "".join(parts) + source[position:]


def _end_of_token(source: str, match: re.Match[str], opaque: Opaque) -> int:
    if match.lastgroup == "nested" and opaque.nested_comment:
        return _end_of_comment(source, match.start(), *opaque.nested_comment)
    if match.lastgroup == "template":
        return _end_of_template(source, match.end(), opaque)
    return match.end()


def _end_of_comment(source: str, start: int, opener: str, closer: str) -> int:
    """Offset after the closer of the nesting comment that begins at `start`."""
    depth = 0
    for mark in re.compile(f"{re.escape(opener)}|{re.escape(closer)}").finditer(source, start):
        depth += 1 if mark[0] == opener else -1
        if depth == 0:
            return mark.end()
    return len(source)


def _end_of_template(source: str, start: int, opaque: Opaque) -> int:
    """Offset after the backquote that ends the template whose text begins at `start`."""
    while match := _TEMPLATE_PART.search(source, start):
        if match[0] == "`":
            return match.end()
        start = _end_of_interpolation(source, match.end(), opaque) if match[0] == "${" else match.end()
    return len(source)


def _end_of_interpolation(source: str, start: int, opaque: Opaque) -> int:
    """Offset after the brace that ends the `${` before `start`; strings and templates inside are skipped."""
    depth = 1
    brace_or_token = re.compile(
        r"(?P<open>\{)|(?P<close>\})|" + opaque.token.pattern, re.DOTALL | re.MULTILINE
    )
    while match := brace_or_token.search(source, start):
        start = match.end() if match.lastgroup in ("open", "close") else _end_of_token(source, match, opaque)
        depth += {"open": 1, "close": -1}.get(match.lastgroup or "", 0)
        if depth == 0:
            return start
    return len(source)
