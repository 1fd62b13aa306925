"""Functions of D files."""

from __future__ import annotations

import re

from . import brace_language
from .brace_language import Grammar
from .opaque import BACK_QUOTED, BLOCK_COMMENT, CHARACTER, DOUBLE_QUOTED, LINE_COMMENT, Opaque
from .source_function import SourceFunction

COMMENT = "//"
RECEIVER = re.compile(r"\bthis\b|\bextern\b|@property|\b_\w+")
DEFINED_NAME = re.compile(r"(?:^|[\s*&>\]])(\w+)\s*\([^;{}]*\)[^;{}()]*\{")

_GRAMMAR = Grammar(
    opaque=Opaque(
        comments=(LINE_COMMENT, BLOCK_COMMENT),
        strings=(
            r"\bq\"(?P<tag>[A-Za-z_]\w*)\n.*?\n(?P=tag)\"",
            r"\bq\"(?:\[.*?\]|\(.*?\)|<.*?>|\{.*?\})\"",
            r"\br\"[^\"]*\"",
            BACK_QUOTED,
            DOUBLE_QUOTED,
            CHARACTER,
        ),
        nested_comment=("/+", "+/"),
    ),
    signature=re.compile(
        r"^(?P<margin>[ \t]*)(?:[\w@!.\[\]*]+(?:\([\w.* \[\]!]*\))?[ \t\[\]*]+)+?"
        r"(?P<name>[a-z_]\w*)[ \t]*\([^{};]*\)[^{};]*\{[ \t]*$",
        re.MULTILINE,
    ),
    comment=COMMENT,
    end_of_description=re.compile(
        r"(?:Params|Parameters|Examples?|See_Also|Throws|Macros|Bugs|Standards|History)\s*:|-{3,}$"
    ),
    not_names=frozenset(
        [
            "if",
            "while",
            "for",
            "foreach",
            "foreach_reverse",
            "switch",
            "with",
            "version",
            "debug",
            "catch",
            "mixin",
            "in",
            "out",
        ]
    ),
    not_signature=re.compile(
        r"\b(?:in|out|do|body)\s*(?:\([^()]*\)\s*)?\{|\b(?:return|else|new|class|struct|template|interface|union)\b|^\s*(?:case|assert|throw)\b|\b(?:if|in|out)\s*\{"
    ),
    brace_below=True,
    bare_members=True,
)


def functions(source: str) -> list[SourceFunction]:
    """Functions and methods without contracts; template constraints join the signature's line."""
    return brace_language.functions(source, _GRAMMAR)


def code_only(source: str) -> str:
    """The file without comments about its licence."""
    return brace_language.without_legal_blocks(source)
