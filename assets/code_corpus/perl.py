"""Subroutines of Perl files."""

from __future__ import annotations

import re

from .indented_blocks import blocks
from .line_kinds import Syntax, line_kinds
from .source_function import KEYWORD_DEFINITION, SourceFunction, comment_above

COMMENT = "#"
RECEIVER = re.compile(r"\$(?:self|class|this)\b|\bshift->")
DEFINED_NAME = KEYWORD_DEFINITION

_SYNTAX = Syntax(
    documentation_start=re.compile(r"=[a-zA-Z]"),
    documentation_end=re.compile(r"=cut\b"),
    data_start=re.compile(r"__(?:END|DATA)__$"),
    heredoc=re.compile(
        r"(?<![\w)\]}$])<<(?P<indented>~?)[ \t]*(?P<quote>[\"']?)(?P<tag>[A-Za-z_]\w*)(?P=quote)"
    ),
)
_SIGNATURE = re.compile(r"([ \t]*)sub[ \t]+(\w+)[ \t]*(?:\([^()]*\)[ \t]*)?\{[ \t]*(?P<remark>#.*)?$")
_OPENING_BRACE_BELOW = re.compile(
    r"^([ \t]*sub[ \t]+\w+[ \t]*(?:\([^()\n]*\))?)[ \t]*\n[ \t]*\{[ \t]*$", re.MULTILINE
)
_SAME_DEPTH = re.compile(r"[A-Z_]+:")
_QUOTED = re.compile(
    r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|(?:=~|!~|\bsplit|[(,])\s*/(?:\\.|[^/\\\n])+/|\b(?:m|qr)/(?:\\.|[^/\\\n])*/"
    r"|\bs/(?:\\.|[^/\\\n])*/(?:\\.|[^/\\\n])*/|(?:^|\s)#[^\n]*|\\[{}]",
)
_FORMATTING_CODE = re.compile(r"[A-Z]<(?:<+ )?([^<>]*?)(?: >+)?>")


def functions(source: str) -> list[SourceFunction]:
    """`sub name {` ... `}` over several lines, braces balanced; a brace on the next line is moved up."""
    lines = _OPENING_BRACE_BELOW.sub(r"\1 {", source).split("\n")
    kinds = line_kinds(lines, _SYNTAX)
    found = []
    for block in blocks(lines, kinds, _SIGNATURE, "}", _SAME_DEPTH):
        code = [line for line, kind in zip(block.lines, kinds[block.first :], strict=False) if kind == "code"]
        if not _balanced("\n".join(code)):
            continue
        signature = block.lines[0]
        if remark := block.match["remark"]:
            signature = signature.removesuffix(remark).rstrip()
        comment = comment_above(lines, block.first, COMMENT) or _documentation_above(
            lines, kinds, block.first
        )
        body = "\n".join(block.lines[1:-1])
        found.append(SourceFunction(block.match[2], "\n".join(comment), signature, body, block.lines[-1]))
    return found


def code_only(source: str) -> str:
    """The file without POD and without its data section."""
    lines = source.split("\n")
    kinds = line_kinds(lines, _SYNTAX)
    return "\n".join(
        line for line, kind in zip(lines, kinds, strict=True) if kind not in ("documentation", "data")
    )


def _balanced(code: str) -> bool:
    """Whether braces outside simple strings, patterns and comments match."""
    bare = _QUOTED.sub(" ", code)
    return bare.count("{") == bare.count("}")


def _documentation_above(lines: list[str], kinds: list[str], first: int) -> list[str]:
    """First prose paragraph of the POD section (`=head2 name` ... `=cut`) above, as comment lines."""
    last = first - 1
    while last >= 0 and not lines[last].strip():
        last -= 1
    start = last
    while start >= 0 and kinds[start] == "documentation":
        start -= 1
    section = lines[start + 1 : last + 1]
    headings = [i for i, line in enumerate(section) if re.match(r"=(?:head\d|item|method|func)\b", line)]
    if not headings:
        return []
    paragraphs = re.split(r"\n\s*\n", "\n".join(section[headings[-1] + 1 :]).strip())
    prose = paragraphs[0].split("\n")
    # a paragraph that is indented is an example, one that starts with `=` a command
    if not prose[0] or prose[0][0] in " \t=":
        return []
    return ["# " + _FORMATTING_CODE.sub(r"\1", line).strip() for line in prose]
