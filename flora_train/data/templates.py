"""How does a row become a prompt and a completion?"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from math import isinf, isnan
from typing import Any

from flora_train.config.errors import Problem, UserError, choices, did_you_mean, user_error
from flora_train.config.task_schema import TaskConfig
from flora_train.data.file_rows import Row

Span = tuple[int, int]


@dataclass(frozen=True)
class PromptCompletion:
    """`completion` is learnt, `prompt` (perhaps empty) is only read. prompt_rows, completion_rows: the parts of them, in characters,
    that are columns of a row; the others are the recipe's."""

    prompt: str
    completion: str
    prompt_rows: tuple[Span, ...] = field(default=(), compare=False)
    completion_rows: tuple[Span, ...] = field(default=(), compare=False)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn: no text, or none of what a template takes from its row."""
        parts = [self.completion[a:b] for a, b in self.completion_rows] or [self.completion]
        return all(not part or part.isspace() for part in parts)


@dataclass(frozen=True)
class Template:
    """Text with {columns} in it, or one column. pieces: (text, the column after it or None)."""

    key: str
    source: str
    pieces: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> list[str]:
        return [column for _, column in self.pieces if column is not None]

    def render(self, row: Row) -> tuple[str, tuple[Span, ...]]:
        """The text of a row, and the parts of it that are its columns; a column that it lacks is empty. Raises UserError for a value
        that is not text or number."""
        parts: list[str] = []
        spans: list[Span] = []
        length = 0
        for literal, column in self.pieces:
            cell = "" if column is None else self._cell(row, column)
            parts += [literal, cell]
            length += len(literal) + len(cell)
            if column is not None:
                spans.append((length - len(cell), length))
        return "".join(parts), tuple(spans)

    def _cell(self, row: Row, column: str) -> str:
        try:
            return cell_text(row.get(column))
        except ValueError as error:
            raise user_error(self.key, self.source, f"column {column!r} {error}") from None


def cell_text(value: Any) -> str:
    """A cell as text. A missing value is empty, also as tables of numbers write it (NaN). Raises ValueError, with the reason, for a
    value that is neither text nor a finite number."""
    if value is None or (isinstance(value, float) and isnan(value)):
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"holds a {type(value).__name__}: it must be text or a number")
    if isinstance(value, float) and isinf(value):
        raise ValueError(f"holds {value}: it must be text or a finite number")
    if not isinstance(value, str):
        return _digits(value)
    # JSON can spell half a character (a lone surrogate), which no tokenizer takes
    return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _digits(value: float) -> str:
    try:
        return str(value)
    except ValueError:
        raise ValueError("holds a whole number of thousands of digits: write it as text") from None


@dataclass(frozen=True)
class Formatter:
    """Row -> PromptCompletion. prompt: None where everything is learnt."""

    prompt: Template | None
    completion: Template

    def __call__(self, row: Row) -> PromptCompletion:
        prompt, prompt_rows = self.prompt.render(row) if self.prompt else ("", ())
        completion, completion_rows = self.completion.render(row)
        return PromptCompletion(prompt, completion, prompt_rows, completion_rows)

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
            raise user_error(key, None, f"name the columns: text, or prompt and completion; the rows have {', '.join(there)}")
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
        raise user_error(key, source, f"is not a template: {error} (a literal brace is written twice)") from None
    for _, column, spec, conversion in parsed:
        if column == "" or spec or conversion:
            raise user_error(key, source, "is not a template: between braces stands a column and nothing else")
    return Template(key, source, tuple((text, column) for text, column, _, _ in parsed))


def _columns(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(str(column) for row in rows for column in row))


def _lacks(column: str, there: list[str], what: str) -> str:
    return f"{column!r} is not a column of the {what} rows; they have {choices(there)}.{did_you_mean(column, there)}"
