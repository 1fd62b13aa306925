"""Reduces comments to their description: no rulers, directives, licences or switched-off code."""

from __future__ import annotations

import re

MAXIMUM_LINES = 8

_DIRECTIVE = re.compile(
    r"rubocop:|:nodoc:|:call-seq:|:stopdoc:|:startdoc:|:section:|:doc:|luacheck:|no critic|use critic|"
    r"frozen_string_literal|vim?:|-\*-|@api private|@private|@!|steep:|type: ignore|"
    r"eslint-|[jt]shint|[jt]slint|istanbul ignore|//go:|"
    r"// \+build|nolint|phpcs:|@psalm|@phpstan|@codeCoverageIgnore|"
    r"@ts-ignore|prettier-ignore|pylint:|# noqa|pragma: no cover|NOLINT|clang-format",
)
_LEGAL = re.compile(r"copyright|\(c\) *\d{4}|licen[sc]e|all rights|permission is|SPDX", re.IGNORECASE)
_CODE_LIKE = re.compile(r"[;{}]$|^(?:end|else|local|my|return)\b|^[\w.$@:]+ *=[^=]|^\w[\w.:>-]*\(.*\)$")
_LUA_BLOCK = re.compile(r"--\[(=*)\[.*?\]\1\][ \t]*\n?", re.DOTALL)


def useful_comment(comment: str, marker: str) -> str:
    """The describing part of a doc comment, at most `MAXIMUM_LINES` lines; empty when there is none."""
    lines = [
        line for line in comment.split("\n") if not is_ruler(line, marker) and not _DIRECTIVE.search(line)
    ]
    lines = _without_blank_ends(lines, marker)
    if len(lines) > MAXIMUM_LINES:
        lines = _first_paragraph(lines, marker)
    texts = [line.lstrip(marker + " \t!") for line in lines]
    # an empty comment line is a paragraph's border, not code
    code = sum(bool(_CODE_LIKE.search(text)) for text in texts)
    words = sum(len(re.findall(r"[A-Za-z]{2,}", text)) for text in texts)
    if len(lines) > MAXIMUM_LINES or 2 * code >= len(lines) or words < 3 or _LEGAL.search("\n".join(lines)):
        return ""
    return "\n".join(lines)


def is_ruler(line: str, marker: str) -> bool:
    """Whether a comment line is decoration such as `#------`."""
    text = line.strip()
    return len(text) > len(marker) + 2 and not re.search(r"[^-=#*_~+/\s]", text)


def without_legal_comments(code: str, marker: str) -> str:
    """Remove comment blocks that speak of copyright or licences, and editor or linter directives."""
    if marker == "--":
        code = _LUA_BLOCK.sub(lambda match: "" if _LEGAL.search(match[0]) else match[0], code)
    kept: list[str] = []
    block: list[str] = []
    for line in [*code.split("\n"), None]:
        if line is not None and line.lstrip().startswith(marker):
            block.append(line)
            continue
        if not _LEGAL.search("\n".join(block)):
            kept += [text for text in block if not _DIRECTIVE.search(text) and not is_ruler(text, marker)]
        block = []
        if line is not None:
            kept.append(line)
    return "\n".join(kept)


def _first_paragraph(lines: list[str], marker: str) -> list[str]:
    """Lines up to the first empty comment line."""
    for number, line in enumerate(lines):
        if not line.strip(marker + " \t"):
            return lines[:number]
    return lines


def _without_blank_ends(lines: list[str], marker: str) -> list[str]:
    """Without empty comment lines at either end."""
    while lines and not lines[0].strip(marker + " \t"):
        lines = lines[1:]
    while lines and not lines[-1].strip(marker + " \t"):
        lines = lines[:-1]
    return lines
