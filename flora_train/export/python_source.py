"""Values as Python source, for snippets on model cards."""

from __future__ import annotations

import json


def python_literal(text: str) -> str:
    """A Python string literal without control or invisible characters."""
    literal = json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)
    return literal.replace("```", "\\x60\\x60\\x60")  # would end the code block of the card
