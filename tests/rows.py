"""Rows for tests of formats, without a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flora_train.data.documents import LocatedRow, RowsOutline, outline


def located(rows: Iterable[Mapping[str, Any]], file: str = "rows.jsonl") -> list[LocatedRow]:
    """Rows as they are read from a file."""
    return [LocatedRow(dict(row), file, number) for number, row in enumerate(rows, start=1)]


def outline_of(rows: Iterable[Mapping[str, Any]]) -> RowsOutline:
    """The outline of rows."""
    return outline(located(rows))
