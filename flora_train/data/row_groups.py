"""Rows of a source by the values of a column, kept in a temporary file until all tasks are loaded."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.data.documents import LocatedRow, outline
from flora_train.data.templates import cell_text
from flora_train.runtime.atomic import disk_errors

IN_MEMORY = 1 << 24
"""Bytes of rows that are kept in memory."""


class RowGroups:
    """The rows of a source, which is read once for the tasks of all values."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        """Value -> number of its rows, in the order in which they first occur."""
        self._codes: dict[str, int] = {}
        self._code_of = array("i")
        self._begins = array("q", [0])
        self._file = SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115

    def add(self, value: str, row: LocatedRow) -> None:
        """Append a row. Raises UserError if the disk is full."""
        self.counts[value] = self.counts.get(value, 0) + 1
        self._code_of.append(self._codes.setdefault(value, len(self._codes)))
        content = pickle.dumps((row.cells, row.file, row.number), protocol=pickle.HIGHEST_PROTOCOL)
        with disk_errors(Path(gettempdir())):
            self._file.write(content)
        self._begins.append(self._begins[-1] + len(content))

    def rows(self, value: str) -> Iterator[LocatedRow]:
        """The rows of a value, in their order."""
        code_of: NDArray[np.int32] = np.frombuffer(self._code_of, dtype=np.int32)
        for i in np.flatnonzero(code_of == self._codes[value]):
            self._file.seek(self._begins[i])
            # the content is our own, of this process
            yield LocatedRow(*pickle.loads(self._file.read(self._begins[i + 1] - self._begins[i])))


class RowsOfValue(Iterable[LocatedRow]):
    """The rows of one value, which can be iterated more than once."""

    def __init__(self, groups: RowGroups, value: str) -> None:
        self.groups, self.value = groups, value

    def __iter__(self) -> Iterator[LocatedRow]:
        return self.groups.rows(self.value)


def group_rows(rows: Iterable[LocatedRow], column: str, key: str, split: str) -> RowGroups:
    """The rows by their value in a column. Raises UserError, naming `key`, where the column is missing or has
    empty cells."""
    groups = RowGroups()
    columns: tuple[str, ...] = ()
    number = 0
    for number, row in enumerate(rows, start=1):
        try:
            value = cell_text(row.cells.get(column)).strip()
        except ValueError as error:
            raise user_error(key, column, f"row {number} of {split} {error}") from None
        if column not in row.cells:
            columns = tuple(dict.fromkeys([*columns, *outline([row]).columns]))
        groups.add(value, row)
    empty = groups.counts.get("", 0)
    if empty == number:
        hint = f"is not a column with values in the {split} rows; they have {choices(columns or [column])}."
        raise user_error(key, column, hint + did_you_mean(column, columns))
    if empty:
        hint = f"is empty in {empty:,} of {number:,} {split} rows: fill it, or remove these rows"
        raise user_error(key, column, hint)
    return groups
