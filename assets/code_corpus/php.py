"""Functions and methods of PHP files."""

from __future__ import annotations

import re

from . import brace_language
from .brace_language import Grammar
from .opaque import BLOCK_COMMENT, DOUBLE_QUOTED, LINE_COMMENT, SINGLE_QUOTED, Opaque
from .source_function import SourceFunction

COMMENT = "//"
RECEIVER = re.compile(r"\$this\b|(?<![$>\w'])(?:self|parent)\b|\bstatic::|\bnew static\b")
DEFINED_NAME = re.compile(r"\bfunction\s+&?(\w+)")

_MODIFIERS = r"(?:(?:final|public|protected|private|static)[ \t]+)*"
_GRAMMAR = Grammar(
    opaque=Opaque(
        comments=(LINE_COMMENT, BLOCK_COMMENT, r"\#(?!\[)[^\n]*"),
        strings=(
            DOUBLE_QUOTED,
            SINGLE_QUOTED,
            r"<<<[ \t]*[\"']?(?P<tag>\w+)[\"']?\n.*?\n[ \t]*(?P=tag)\b",
            # the page around the code
            r"\?>.*?(?:<\?(?:php|=)|\Z)",
        ),
    ),
    signature=re.compile(
        rf"^(?P<margin>[ \t]*){_MODIFIERS}function[ \t]+&?(?P<name>\w+)"
        r"[ \t]*\([^{};]*\)\s*(?::\s*[?\w\\|]+\s*)?\{[ \t]*$",
        re.MULTILINE,
    ),
    comment=COMMENT,
    end_of_description=re.compile(r"@|<code>|\{@inheritdoc", re.IGNORECASE),
    attribute=re.compile(r"[ \t]*#\[.*\]$"),
    # a method that stands alone is a function
    dropped_words=re.compile(rf"^{_MODIFIERS}"),
)


def functions(source: str) -> list[SourceFunction]:
    """Functions and methods with a one-line signature; `{` moves up to it, `public static` and the like
    go."""
    return brace_language.functions(source, _GRAMMAR)


def code_only(source: str) -> str:
    """The file without comments about its licence."""
    return brace_language.without_legal_blocks(source)
