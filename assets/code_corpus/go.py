"""Functions of Go files."""

from __future__ import annotations

import re

from . import brace_language
from .brace_language import Grammar
from .opaque import BACK_QUOTED, BLOCK_COMMENT, CHARACTER, DOUBLE_QUOTED_LINE, LINE_COMMENT, Opaque
from .source_function import SourceFunction

COMMENT = "//"
RECEIVER = re.compile(r"\Afunc \(")
DEFINED_NAME = re.compile(r"\bfunc\s+(?:\([^()]*\)\s*)?(\w+)|(\w+)\s*:?=\s*func\b")

_GRAMMAR = Grammar(
    opaque=Opaque(
        comments=(LINE_COMMENT, BLOCK_COMMENT),
        strings=(DOUBLE_QUOTED_LINE, CHARACTER, BACK_QUOTED),
    ),
    signature=re.compile(
        r"^(?P<margin>)func (?:\([^()\n]*\) )?(?P<name>\w+)(?:\[[^\]\n]*\])?\([^\n]*\{[ \t]*$", re.MULTILINE
    ),
    comment=COMMENT,
    end_of_description=re.compile(r"(?:For )?examples?:|go:|nolint|\+build|export ", re.IGNORECASE),
)


def functions(source: str) -> list[SourceFunction]:
    """Functions and methods with a one-line signature."""
    return brace_language.functions(source, _GRAMMAR)


def code_only(source: str) -> str:
    """The file without comments about its licence."""
    return brace_language.without_legal_blocks(source)
