"""Reads JSON without losing any value. One reader for every file of rows that others wrote."""

from __future__ import annotations

import json
from typing import Any


def read_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, with the reason in one line, where it is not JSON, gives a key twice in one
    object (one of the values would be lost), is nested too deeply, or holds a number too long to read."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"is not JSON: {error.msg} ({at})") from None
    except RecursionError:
        raise ValueError("is nested too deeply to be read") from None
    except DoubledKey:
        raise
    except ValueError:
        raise ValueError("holds a number of thousands of digits: write it as text") from None


class DoubledKey(ValueError):
    """A key that an object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise DoubledKey(f"has the key {twice!r} twice: one of the values would be lost")
    return found
