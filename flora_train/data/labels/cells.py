"""Cells of labelled rows: labels, lists of labels or tokens, and numbers."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np

from flora_train.config.json_format import parse_json
from flora_train.data.templates import cell_text


def label_text(cell: Any) -> str:
    """A label as text, without white space around it; empty if there is none.

    Raises ValueError, with the reason, for what is no label.
    """
    if isinstance(cell, bool | np.bool_):
        return str(bool(cell)).lower()
    if isinstance(cell, float) and isfinite(cell) and cell.is_integer():
        return str(int(cell))  # tables with missing cells have whole numbers as 1.0
    return cell_text(cell).strip()


def label_list(cell: Any, separator: str | None) -> tuple[str, ...]:
    """The labels of a text that can have several: a list, JSON text of one, labels with separators between
    them, or a single label. No label is an empty tuple. Raises ValueError as `label_text` does."""
    items = as_list(cell)
    if items is None and isinstance(cell, str) and separator is not None:
        items = cell.split(separator)
    if items is None:
        items = [cell]
    labels = [label_text(item) for item in items]
    return tuple(dict.fromkeys(label for label in labels if label))


def as_list(cell: Any) -> list[Any] | None:
    """A list, also from JSON text of one; None for other cells. Raises ValueError for text that begins like a
    list and is none."""
    if isinstance(cell, list | tuple):
        return list(cell)
    if isinstance(cell, np.ndarray):
        return list(cell.tolist())
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return None
    try:
        content = parse_json(cell)
    except ValueError as error:
        raise ValueError(f"begins with a bracket and is no JSON list: it {error}") from None
    return content if isinstance(content, list) else None


def number(cell: Any) -> float:
    """A finite number, also as text. Raises ValueError, with the reason, for other cells."""
    if isinstance(cell, bool | np.bool_):
        raise ValueError(f"is {str(bool(cell)).lower()}, which is no number")
    if isinstance(cell, str):
        try:
            value = float(cell.strip())
        except ValueError:
            raise ValueError(f"is {shortened(cell)}, which is no number") from None
    elif isinstance(cell, int | float | np.number):
        value = _as_float(cell)
    else:
        raise ValueError(f"holds a {type(cell).__name__}: it must be a number")
    if not isfinite(value):
        raise ValueError(f"is {value}, which is not finite")
    return value


def _as_float(cell: Any) -> float:
    try:
        return float(cell)
    except OverflowError:
        raise ValueError("is too large a number") from None


def shortened(value: Any) -> str:
    """A value for an error."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
