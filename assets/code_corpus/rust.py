"""Functions of Rust files."""

from __future__ import annotations

import re

from . import brace_language
from .brace_language import Grammar
from .opaque import CHARACTER, DOUBLE_QUOTED, LINE_COMMENT, Opaque
from .source_function import SourceFunction

COMMENT = "//"
RECEIVER = re.compile(r"\bself\b|\bSelf\b")
DEFINED_NAME = re.compile(r"\bfn\s+(\w+)|\blet\s+(\w+)\s*=\s*(?:move\s*)?\|")

_GRAMMAR = Grammar(
    opaque=Opaque(
        comments=(LINE_COMMENT,),
        strings=(r"\bb?r(?P<hashes>\#*)\".*?\"(?P=hashes)", DOUBLE_QUOTED, CHARACTER),
        nested_comment=("/*", "*/"),
    ),
    signature=re.compile(
        r"^(?P<margin>[ \t]*)(?:pub(?:\([^()\n]*\))?[ \t]+)?(?:(?:default|const|async|unsafe|extern)[ \t]+)*"
        r"fn[ \t]+(?P<name>\w+)[^\n{};]*\{[ \t]*$",
        re.MULTILINE,
    ),
    comment="///",
    end_of_description=re.compile(r"#+ |\*?\*?examples?\*?\*?:|```", re.IGNORECASE),
    attribute=re.compile(r"[ \t]*#\[.*\]$"),
    test=re.compile(r"\btest\b"),
)


def functions(source: str) -> list[SourceFunction]:
    """Functions and methods with a one-line signature; no tests; attributes above it go."""
    found = brace_language.functions(source, _GRAMMAR)
    # `$` belongs to the body of a macro
    return [function for function in found if "$" not in function.signature + function.body]


def code_only(source: str) -> str:
    """The file without comments about its licence."""
    return brace_language.without_legal_blocks(source)
