"""Values in rows of conversations: JSON in text, fields that other rows have, and values in errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flora_train.config.json_format import parse_json

LONGEST = 60
"""Characters of a value that an error repeats."""


def as_json(text: str, subject: str) -> Any:
    """The content of JSON text. subject: begins the error, such as `'tools' is text that`, which
    `is not JSON` follows."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{subject} {error}") from None


def shorten(value: Any) -> str:
    """A value as an error repeats it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def without_none(value: Any) -> Any:
    """A value without the fields of objects that are None, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_none(cell) for key, cell in value.items() if cell is not None}
    if isinstance(value, list | tuple):
        return [without_none(one) for one in value]
    return value
