"""Methods of Ruby files."""

from __future__ import annotations

import re

from .indented_blocks import blocks
from .line_kinds import Syntax, line_kinds
from .source_function import KEYWORD_DEFINITION, SourceFunction, comment_above

COMMENT = "#"
RECEIVER = re.compile(r"@\w|\bself\b|\bsuper\b")
DEFINED_NAME = KEYWORD_DEFINITION

_SYNTAX = Syntax(
    documentation_start=re.compile(r"=begin\b"),
    documentation_end=re.compile(r"=end\b"),
    data_start=re.compile(r"__END__$"),
    heredoc=re.compile(r"(?<![\w)\]])<<(?P<indented>[~-]?)(?P<quote>[\"'`]?)(?P<tag>[A-Z_]\w*)(?P=quote)"),
)
_SIGNATURE = re.compile(
    r"([ \t]*)def[ \t]+(?:self\.)?([a-z_]\w*[?!=]?)[ \t]*"
    r"(?:\((?:[^()]|\([^()]*\))*\))?[ \t]*(?P<remark>#.*)?$",
)
_SAME_DEPTH = re.compile(r"(?:rescue|ensure|else)\b")


def functions(source: str) -> list[SourceFunction]:
    """`def` ... `end` over several lines; not operators, endless methods, arguments without brackets."""
    lines = source.split("\n")
    found = []
    for block in blocks(lines, line_kinds(lines, _SYNTAX), _SIGNATURE, "end", _SAME_DEPTH):
        signature = block.lines[0]
        if remark := block.match["remark"]:
            signature = signature.removesuffix(remark).rstrip()
        name = block.match[2].rstrip("?!=")
        comment = "\n".join(comment_above(lines, block.first, COMMENT))
        found.append(SourceFunction(name, comment, signature, "\n".join(block.lines[1:-1]), block.lines[-1]))
    return found


def code_only(source: str) -> str:
    """The file without `=begin` ... `=end` and without its data section."""
    lines = source.split("\n")
    kinds = line_kinds(lines, _SYNTAX)
    return "\n".join(
        line for line, kind in zip(lines, kinds, strict=True) if kind not in ("documentation", "data")
    )
