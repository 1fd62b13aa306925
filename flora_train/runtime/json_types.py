"""Types of values in the JSON files of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field


def _without_surrogates(value: object) -> object:
    """Escape lone surrogates, which stand for bytes of a path that are not UTF-8: no file can hold them."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "backslashreplace").decode()
    return value


Text = Annotated[str, BeforeValidator(_without_surrogates)]
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
