"""Reads JSON of users and of our own files without losing a value, with one-line reasons for what cannot be
read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from flora_train.config.errors import user_error

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
"""Any value that JSON can express."""
JsonObject: TypeAlias = dict[str, JsonValue]
"""A JSON object as it is read."""


class DuplicateKeyError(ValueError):
    """A key that an object has twice, so that one of its values would be lost."""


class NonFiniteError(ValueError):
    """NaN or infinity, which are not JSON numbers."""


def parse_json(text: str | bytes, *, finite: bool = False) -> JsonValue:
    """The value of a JSON text. finite: NaN and infinity are errors, not numbers.

    Raises ValueError, with the reason in one line, for text that is not JSON, has a key twice in one object,
    is nested too deeply, or holds a number that is too long to read.
    """
    try:
        value: JsonValue = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse if finite else None
        )
        return value
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"is not JSON: {error.msg} ({place})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ValueError("is nested too deeply to be read") from None
    except (DuplicateKeyError, NonFiniteError):
        raise
    except ValueError:
        raise ValueError("holds a number of thousands of digits: write it as text") from None


def parse_json_at(location: str, text: str) -> JsonValue:
    """As `parse_json`. Raises UserError that names `location`, such as `file.jsonl:3`."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise user_error(location, None, str(error)) from error


def parse_object(text: str | bytes) -> JsonObject:
    """The object of a JSON text without NaN and infinity. Raises ValueError with the reason in one line."""
    content = parse_json(text, finite=True)
    if not isinstance(content, dict):
        raise ValueError("is not a JSON object")
    return content


def read_object(path: Path, hint: str) -> JsonObject:
    """The object in a JSON file of a run. hint: what to do about a missing or damaged file.

    Raises UserError if the file is missing, unreadable or not a JSON object.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe or a device may never end
        raise user_error(str(path), None, f"is not a regular file: {hint}")
    try:
        return parse_object(path.read_bytes())
    except OSError as error:
        raise user_error(str(path), None, f"cannot be read ({error.strerror}): {hint}") from error
    except (ValueError, MemoryError) as error:
        raise user_error(str(path), None, f"is damaged (it {error}): {hint}") from error


def _object(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
    content: JsonObject = {}
    for key, value in pairs:
        if key in content:
            raise DuplicateKeyError(f"has the key {key!r} twice: one of the values would be lost")
        content[key] = value
    return content


def _refuse(constant: str) -> NoReturn:
    raise NonFiniteError(f"holds {constant}, which is not a JSON number")
