"""Functions of JavaScript files."""

from __future__ import annotations

import re

from . import brace_language
from .brace_language import Grammar
from .opaque import BLOCK_COMMENT, DOUBLE_QUOTED_LINE, LINE_COMMENT, SINGLE_QUOTED_LINE, Opaque
from .source_function import SourceFunction

COMMENT = "//"
RECEIVER = re.compile(r"\bthis\b|\bprototype\b")
DEFINED_NAME = re.compile(
    r"\bfunction\s*\*?\s*([\w$]+)"
    r"|([\w$]+)[\"']?\s*[=:]\s*(?:async\s+)?(?:function\b|\([^()]*\)\s*=>|[\w$]+\s*=>)"
    r"|^[ \t]*(?:(?:static|async|get|set)\s+)*([\w$]+)\([^()]*\)\s*\{",
    re.MULTILINE,
)

# what compilers to JavaScript leave in their output
_COMPILED = "__esModule"
_GRAMMAR = Grammar(
    opaque=Opaque(
        comments=(LINE_COMMENT, BLOCK_COMMENT),
        strings=(DOUBLE_QUOTED_LINE, SINGLE_QUOTED_LINE),
        javascript=True,
    ),
    signature=re.compile(
        r"^(?P<margin>[ \t]*)(?:export[ \t]+(?:default[ \t]+)?)?"
        r"(?:(?:async[ \t]+)?function[ \t]*\*?[ \t]*(?P<name>[\w$]+)[ \t]*\([^{}()]*\)"
        r"|(?:(?:var|let|const)[ \t]+)?(?:[\w$]+\.)*(?P<assigned>[\w$]+)[ \t]*=[ \t]*(?:async[ \t]+)?"
        r"(?:function[ \t]*\*?[ \t]*[\w$]*[ \t]*\([^{}()]*\)|\([^{}()]*\)[ \t]*=>|[\w$]+[ \t]*=>)"
        r")\s*\{[ \t]*$",
        re.MULTILINE,
    ),
    comment=COMMENT,
    end_of_description=re.compile(r"@(?!description|desc\b)|\*\*?@|Examples?:", re.IGNORECASE),
    dropped_words=re.compile(r"^export[ \t]+(?:default[ \t]+)?"),
)


def functions(source: str) -> list[SourceFunction]:
    """Function declarations and functions assigned to a name, with a one-line signature; no methods, nothing
    compiled."""
    return [] if _COMPILED in source else brace_language.functions(source, _GRAMMAR)


def code_only(source: str) -> str:
    """The file without comments about its licence."""
    return brace_language.without_legal_blocks(source)
