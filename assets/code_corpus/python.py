"""Functions of Python files, found with Python's own parser."""

from __future__ import annotations

import ast
import inspect
import re
import warnings

from .source_function import Documented, SourceFunction

COMMENT = "#"
INDENTATION = 4
RECEIVER = re.compile(r"\bself\b|\bcls\b|\bsuper\(")
DEFINED_NAME = re.compile(r"\bdef\s+(\w+)|^[ \t]*(\w+)\s*=\s*lambda\b", re.MULTILINE)

_END_OF_DESCRIPTION = re.compile(r":\w+|@\w+|>>> |\.\. |[A-Z]\w+:?$|-{3,}$|={3,}$")


def functions(source: str) -> list[SourceFunction]:
    """Functions of a module with a one-line signature; the description of the docstring is part of the
    prompt."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    lines, found = source.split("\n"), []
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and (function := _function(node, lines)):
            found.append(function)
    return found


def code_only(source: str) -> str:
    """The file itself."""
    return source


def _function(node: ast.FunctionDef, lines: list[str]) -> SourceFunction | None:
    """The function of a definition; None when its signature or its parts share lines."""
    signature = lines[node.lineno - 1]
    documented = ast.get_docstring(node, clean=False) is not None
    first = node.body[1] if documented and len(node.body) > 1 else node.body[0]
    start = node.body[0].end_lineno if documented else node.lineno
    if node.decorator_list or not signature.endswith(":") or (documented and len(node.body) == 1):
        return None
    if node.body[0].lineno != node.lineno + 1 or start is None or first.lineno <= start:
        return None
    if first.col_offset != INDENTATION:
        return None
    comment = _description(inspect.cleandoc(ast.get_docstring(node) or ""))
    # the last line plays the part that a closing brace plays elsewhere
    body = lines[start : node.end_lineno]
    return Documented(node.name, comment, signature, "\n".join(body[:-1]), body[-1])


def _description(docstring: str) -> str:
    """The docstring up to its lists of parameters and examples, as comment lines."""
    kept: list[str] = []
    for line in docstring.split("\n"):
        if _END_OF_DESCRIPTION.match(line.strip()) or "\\" in line or line.endswith('"'):
            break
        kept.append(f"{COMMENT} {line}".rstrip())
    while kept and kept[-1] == COMMENT:
        kept.pop()
    return "\n".join(kept)
