"""Reads labelled rows: the texts of each, and what it is labelled with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flora_train.config.errors import Problem, UserError, choices, did_you_mean, user_error
from flora_train.config.task_schema import TaskConfig
from flora_train.data.documents import LocatedRow, RowsOutline
from flora_train.data.labels.cells import as_list, label_list, label_text, number, shortened
from flora_train.data.labels.spec import LabelType
from flora_train.data.templates import Template, cell_text, parse_template

TEXT, TOKENS = "text", "tokens"
"""Default columns of texts, and of lists of tokens."""


@dataclass(frozen=True)
class LabelledRow:
    """The contents of a row."""

    texts: tuple[str, ...]
    """One text, or the two of a pair; the tokens of a tagged text."""
    labels: tuple[str, ...] = ()
    """One label, all labels of the text, or one for each token; empty for regression."""
    number: float = 0.0
    """What regression predicts."""


def label_type_of(task: TaskConfig) -> LabelType:
    """What a label of this task is."""
    if task.token_labels is not None:
        return "tokens"
    if task.regression:
        return "regression"
    return "multi" if task.multi_label else "single"


class LabelReader:
    """Reads the rows of a task of labelled texts. key: its configuration key.

    Raises UserError for a template that is malformed.
    """

    def __init__(self, task: TaskConfig, key: str) -> None:
        self.task, self.key = task, key
        self.task_type = label_type_of(task)
        self.column = str(task.token_labels or task.label)
        self.column_key = f"{key}.token_labels" if task.token_labels is not None else f"{key}.label"
        self.known = None if task.known_labels is None else frozenset(task.known_labels)
        self.text_key = f"{key}.text"
        text = task.text
        if text is None and task.prompt is not None:
            text, self.text_key = task.prompt, f"{key}.prompt"
        if text is None:
            text = TOKENS if self.task_type == "tokens" else TEXT
        sources = text if isinstance(text, list) else [text]
        self.sources = tuple(sources)
        self.templates: tuple[Template, ...] = ()
        if self.task_type != "tokens":
            self.templates = tuple(parse_template(source, self.text_key) for source in sources)

    def check(self, rows: RowsOutline, split: str) -> None:
        """Raises UserError if a column is in no row. split: name of the rows."""
        problems: list[Problem] = []
        needed = {self.column: self.column_key}
        for column in self._text_columns():
            needed.setdefault(column, self.text_key)
        for column, key in needed.items():
            if column not in rows.columns:
                hint = f"is not a column of the {split} rows; they have {choices(rows.columns)}."
                problems.append(Problem(key, column, hint + did_you_mean(column, rows.columns)))
        if problems:
            raise UserError(*problems)

    def read(self, row: LocatedRow) -> LabelledRow:
        """Raises UserError that names file, row and remedy for a row that cannot be used."""
        if self.task_type == "tokens":
            return self._tagged(row)
        texts = tuple(self._text(row, template) for template in self.templates)
        if self.task_type == "regression":
            return LabelledRow(texts, number=self._number(row))
        if self.task_type == "multi":
            return LabelledRow(texts, self._labels(row))
        return LabelledRow(texts, (self._label(row),))

    def _text_columns(self) -> list[str]:
        if self.task_type == "tokens":
            return list(self.sources)
        return [column for template in self.templates for column in template.columns]

    def _text(self, row: LocatedRow, template: Template) -> str:
        text, spans = template.render(row)
        parts = [text[begin:end] for begin, end in spans] or [text]
        if all(not part.strip() for part in parts):
            self._fail_for_text(row, template)
        return text

    def _fail_for_text(self, row: LocatedRow, template: Template) -> None:
        for column in template.columns:
            _check_column(row, column, self.text_key)
        if len(self.templates) > 1:
            hint = f"is empty in {row.where}, and a pair needs both texts: fill it, or remove the row"
        else:
            hint = f"is empty in {row.where}, so that there is nothing to label: fill it, or remove the row"
        raise user_error(self.text_key, template.source, hint)

    def _label(self, row: LocatedRow) -> str:
        label = self._read(row, label_text)
        if not label:
            _check_column(row, self.column, self.column_key)
            raise self._error(row, "is empty", "give a label, or remove the row")
        self._check_known(row, (label,))
        return label

    def _labels(self, row: LocatedRow) -> tuple[str, ...]:
        cell = row.cells.get(self.column)
        if cell is None:
            _check_column(row, self.column, self.column_key)
            raise self._error(row, "is missing", "give a list of labels, which can be empty: []")
        labels = self._read(row, lambda cell: label_list(cell, self.task.label_separator))
        self._check_known(row, labels)
        return labels

    def _number(self, row: LocatedRow) -> float:
        cell = row.cells.get(self.column)
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            _check_column(row, self.column, self.column_key)
            raise self._error(row, "is empty", "give a number, or remove the row")
        try:
            return number(cell)
        except ValueError as error:
            hint = "regression needs a finite number: correct it, or remove the row"
            if isinstance(cell, str) and "no number" in str(error):
                hint = "regression needs a number: correct it, or remove regression to learn labels"
            raise self._error(row, str(error), hint) from None

    def _tagged(self, row: LocatedRow) -> LabelledRow:
        tokens = self._list(row, self.sources[0], self.text_key, "tokens")
        labels = self._list(row, self.column, self.column_key, "labels")
        if not tokens:
            hint = f"has no token in {row.where}, so that there is nothing to label: remove the row"
            raise user_error(self.text_key, self.sources[0], hint)
        if len(tokens) != len(labels):
            reason = f"has {_count(labels, 'label')} for {_count(tokens, 'token')} of {self.sources[0]!r}"
            raise self._error(row, reason, "give one label for each token")
        words = tuple(self._items(row, tokens, cell_text, column=self.sources[0], key=self.text_key))
        names = tuple(self._items(row, labels, label_text, column=self.column, key=self.column_key))
        self._check_known(row, names)
        return LabelledRow(words, names)

    def _list(self, row: LocatedRow, column: str, key: str, content: str) -> list[Any]:
        """The list in a cell."""
        try:
            items = as_list(row.cells.get(column))
        except ValueError as error:
            raise user_error(key, column, f"{error} in {row.where}: write a JSON list of {content}") from None
        if items is None:
            _check_column(row, column, key)
            given = shortened(row.cells.get(column)) if row.cells.get(column) is not None else "empty"
            hint = f"is {given} in {row.where}, and no list: give a list of {content}"
            raise user_error(key, column, hint)
        return items

    def _items(
        self, row: LocatedRow, items: Sequence[Any], read: Callable[[Any], str], *, column: str, key: str
    ) -> list[str]:
        """The items of a list as text, of which none is empty."""
        texts = []
        for number_, item in enumerate(items, start=1):
            try:
                text = read(item)
            except ValueError as error:
                raise user_error(key, column, f"item {number_} {error} in {row.where}: correct it") from None
            if not text.strip():
                hint = f"item {number_} is empty in {row.where}: fill it, or remove it and its partner"
                raise user_error(key, column, hint)
            texts.append(text)
        return texts

    def _read(self, row: LocatedRow, read: Callable[[Any], Any]) -> Any:
        try:
            return read(row.cells.get(self.column))
        except ValueError as error:
            remedy = "correct it, or remove the row"
            if isinstance(row.cells.get(self.column), list) and self.task_type == "single":
                remedy = "set multi_label: true for lists of labels, or token_labels for labels of tokens"
            raise self._error(row, str(error), remedy) from None

    def _check_known(self, row: LocatedRow, labels: Sequence[str]) -> None:
        """Raises UserError for a label outside the list."""
        if self.known is None:
            return
        unknown = next((label for label in labels if label not in self.known), None)
        if unknown is None:
            return
        name = "verbalizer" if self.task.labels is None else "labels"
        close = did_you_mean(unknown, self.known)
        reason = f"is {unknown!r}, which is not in {name} ({choices(self.known)}),"
        raise self._error(row, reason, f"correct it, or add it to {name}.{close}")

    def _error(self, row: LocatedRow, reason: str, remedy: str) -> UserError:
        return user_error(self.column_key, self.column, f"{reason} in {row.where}: {remedy}")


def _count(items: Sequence[object], name: str) -> str:
    return f"{len(items):,} {name}{'' if len(items) == 1 else 's'}"


def _check_column(row: LocatedRow, column: str, key: str) -> None:
    """Raises UserError if a row does not have this column at all."""
    if column not in row.cells:
        hint = (
            f"is missing in {row.where}, which has {choices(map(str, row.cells))}: fill it, remove the row, "
            "or name another column."
        )
        raise user_error(key, column, hint + did_you_mean(column, map(str, row.cells)))
