"""How does a row become a prompt and a completion?"""

from __future__ import annotations

import string
from dataclasses import dataclass

from flora_train.config.errors import Problem, UserError, choices, did_you_mean, fail
from flora_train.config.task_schema import TaskConfig
from flora_train.data.sources import Row


@dataclass(frozen=True)
class TextExample:
    """`completion` is learnt, `prompt` (perhaps empty) is only read."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Template:
    """Text with {columns} in it, or one column. pieces: (text, the column after it or None)."""

    key: str
    source: str
    pieces: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> list[str]:
        return [column for _, column in self.pieces if column is not None]

    def render(self, row: Row) -> str:
        """The text of a row; a column that it lacks is empty. Raises UserError for a value that is not text or number."""
        return "".join(text if column is None else text + self._cell(row, column) for text, column in self.pieces)

    def _cell(self, row: Row, column: str) -> str:
        value = row.get(column)
        if value is None:
            return ""
        if not isinstance(value, str | int | float):
            raise fail(self.key, self.source, f"column {column!r} holds a {type(value).__name__}: it must be text or a number")
        # JSON can spell half a character (a lone surrogate), which no tokenizer takes
        return str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(frozen=True)
class Formatter:
    """Row -> TextExample. prompt: None where everything is learnt."""

    prompt: Template | None
    completion: Template

    def __call__(self, row: Row) -> TextExample:
        return TextExample(self.prompt.render(row) if self.prompt else "", self.completion.render(row))

    def check(self, rows: list[Row], what: str) -> None:
        """Every column must be in some row; rows that lack it are empty there. Raises UserError with the columns there
        are. what: which rows, e.g. `training`."""
        there = _columns(rows)
        problems = [
            Problem(template.key, template.source, _lacks(column, there, what))
            for template in ([self.prompt] if self.prompt else []) + [self.completion]
            for column in template.columns
            if column not in there
        ]
        if problems:
            raise UserError(*problems)


def make_formatter(task: TaskConfig, rows: list[Row], key: str) -> Formatter:
    """The formatter for a task's columns or templates, checked against its training rows.

    Without any of them: columns `prompt` and `completion` if the rows have both, else `text`.
    Raises UserError if a named column is missing or a template is malformed.
    """
    prompt, completion, text = task.prompt, task.completion, task.text
    if prompt is None and text is None:
        there = _columns(rows)
        if {"prompt", "completion"} <= set(there):
            prompt, completion = "prompt", "completion"
        elif "text" in there:
            text = "text"
        else:
            raise fail(key, None, f"name the columns: text, or prompt and completion; the rows have {', '.join(there)}")
    if text is not None:
        formatter = Formatter(None, parse_template(text, f"{key}.text"))
    else:
        formatter = Formatter(parse_template(str(prompt), f"{key}.prompt"), parse_template(str(completion), f"{key}.completion"))
    formatter.check(rows, "training")
    return formatter


def parse_template(source: str, key: str) -> Template:
    """A word is a column; text with {columns} in it is a template. Raises UserError if its braces are malformed."""
    if "{" not in source:
        return Template(key, source, (("", source),))
    try:
        parsed = list(string.Formatter().parse(source))
    except ValueError as error:
        raise fail(key, source, f"is not a template: {error} (a literal brace is written twice)") from None
    for _, column, spec, conversion in parsed:
        if column == "" or spec or conversion:
            raise fail(key, source, "is not a template: between braces stands a column and nothing else")
    return Template(key, source, tuple((text, column) for text, column, _, _ in parsed))


def _columns(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(str(column) for row in rows for column in row))


def _lacks(column: str, there: list[str], what: str) -> str:
    return f"{column!r} is not a column of the {what} rows; they have {choices(there)}.{did_you_mean(column, there)}"
