"""Read a JSON object from a file: a mapping, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flora_train.config.errors import first_line, user_error


def read_object(path: Path, hint: str) -> dict[str, Any]:
    """The object in a JSON file. hint: what a user does about a damaged one. Raises UserError if the file is missing, unreadable or
    no JSON object."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise user_error(str(path), None, f"is no regular file: {hint}")  # a pipe or a device may never end
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise user_error(str(path), None, f"cannot be read ({error.strerror}): {hint}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise user_error(str(path), None, f"is damaged ({_reason(error)}): {hint}") from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Raises ValueError or RecursionError for what is no JSON object, or holds NaN or infinity."""
    content = json.loads(text, parse_constant=_no_number)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _reason(error: BaseException) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
