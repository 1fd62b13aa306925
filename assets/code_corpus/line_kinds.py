"""Classifies the lines of Ruby and Perl files: those that are not code can mislead a search for `end`."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Syntax:
    """The few facts about a language that decide what a line is."""

    documentation_start: re.Pattern[str]
    documentation_end: re.Pattern[str]
    data_start: re.Pattern[str]
    heredoc: re.Pattern[str]
    """Groups: `indented` (non-empty when the terminator may be indented) and `tag`."""


def line_kinds(lines: list[str], syntax: Syntax) -> list[str]:
    """One of "code", "comment", "heredoc", "documentation", "data" for every line; blank lines are "code"."""
    kinds: list[str] = []
    pending: list[tuple[str, bool]] = []
    state = "code"
    for number, line in enumerate(lines):
        if pending:
            kinds.append("heredoc")
            tag, indented = pending[0]
            if (line.strip() if indented else line.rstrip()) == tag:
                pending.pop(0)
            continue
        if state == "documentation":
            kinds.append(state)
            state = "code" if syntax.documentation_end.match(line) else state
            continue
        if state == "data" or syntax.data_start.match(line):
            state = "data"
            kinds.append(state)
            continue
        if syntax.documentation_start.match(line):
            # an end marker without a start is documentation of one line
            state = "code" if syntax.documentation_end.match(line) else "documentation"
            kinds.append("documentation")
            continue
        if line.lstrip().startswith("#"):
            kinds.append("comment")
            continue
        kinds.append("code")
        pending = _heredocs_opened(line, lines[number + 1 :], syntax)
    return kinds


def _heredocs_opened(line: str, following: list[str], syntax: Syntax) -> list[tuple[str, bool]]:
    """(terminator, may be indented) of the heredocs that `line` opens and that a line of `following` ends."""
    if "<<" not in line:
        return []
    opened = [(match["tag"], bool(match["indented"])) for match in syntax.heredoc.finditer(line)]
    return [
        (tag, indented)
        for tag, indented in opened
        if any((text.strip() if indented else text.rstrip()) == tag for text in following)
    ]
