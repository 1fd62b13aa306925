"""LabelSurvey: the labels of a source's rows, collected while these are read for the first time."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import choices, user_error
from flora_train.config.label_schema import MOST_LABELS
from flora_train.config.task_schema import TaskConfig
from flora_train.data.documents import LocatedRow
from flora_train.data.labels.reader import LabelReader


class LabelSurvey:
    """Checks the rows of a source, and collects their labels.

    task: with the labels that are known; key: its configuration key.
    """

    def __init__(self, task: TaskConfig, key: str) -> None:
        self.reader = LabelReader(task, key)
        self.first_rows: dict[str, str] = {}
        """Label -> the place of the first row that has it."""
        self._codes: dict[str, int] = {}
        self._code_of = array("q")

    def observe(self, rows: Iterable[LocatedRow]) -> Iterator[LocatedRow]:
        """The same rows, each after `add`."""
        for row in rows:
            self.add(row)
            yield row

    def add(self, row: LocatedRow) -> None:
        """Raises UserError that names a row that cannot be used."""
        labels = self.reader.read(row).labels
        for label in labels:
            if label not in self._codes:
                self._codes[label] = len(self._codes)
                self.first_rows[label] = row.where
        if len(self._codes) > MOST_LABELS:
            hint = (
                f"has more than {MOST_LABELS:,} different labels: for numbers set regression: true, else "
                "name the column of labels"
            )
            raise user_error(self.reader.column_key, self.reader.column, hint)
        if self.reader.task_type == "single":
            self._code_of.append(self._codes[labels[0]])

    @property
    def strata(self) -> NDArray[np.int64]:
        """int64 [n]: for each row a number of its label, in the order of `labels`; only of rows with one
        label each."""
        codes = np.frombuffer(self._code_of, dtype=np.int64)
        order = np.array([self._codes[label] for label in self.labels], dtype=np.int64)
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        return rank[codes]

    @property
    def labels(self) -> list[str]:
        """The labels in an order that does not depend on that of the rows: numbers by size, others by their
        characters."""
        return sorted_labels(self.first_rows)


def sorted_labels(labels: dict[str, str]) -> list[str]:
    """Labels by size if all are whole numbers, else by their characters."""
    if all(_is_whole(label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _is_whole(label: str) -> bool:
    digits = label.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= 18


def check_targets_known(survey: LabelSurvey, others: Mapping[str, LabelSurvey]) -> None:
    """Raises UserError for a label that only held-out rows have, where the labels are those of the training
    rows. others: split -> the survey of its own source."""
    for split, other in others.items():
        unknown = [label for label in other.labels if label not in survey.first_rows]
        if not unknown:
            continue
        hint = (
            f"is {unknown[0]!r} in {other.first_rows[unknown[0]]} ({split}), a label that no training row "
            f"has; they have {choices(survey.labels)}: give training rows with it, or remove its {split} rows"
        )
        raise user_error(other.reader.column_key, other.reader.column, hint)
