"""Formats rows as prompt and completion, by columns or templates."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from math import isinf, isnan
from typing import Any

from flora_train.config.errors import Problem, UserError, choices, did_you_mean, user_error
from flora_train.config.json_format import JsonValue
from flora_train.config.moved_datasets import stack_v2_script
from flora_train.config.task_schema import TaskConfig
from flora_train.data.documents import LocatedRow, RowsOutline

IDENTIFIER = "blob_id"
"""Column of The Stack v2: the identifier of a file at Software Heritage."""
PAIR = {"chosen", "rejected"}
"""Columns of the completions of a pair."""
Span = tuple[int, int]


@dataclass(frozen=True)
class PromptCompletion:
    """The text of one example: `prompt` (which may be empty) is only read, `completion` is learnt."""

    prompt: str
    completion: str
    prompt_rows: tuple[Span, ...] = field(default=(), compare=False)
    """Spans of the prompt, in characters, that are columns of a row. The rest is the recipe's text."""
    completion_rows: tuple[Span, ...] = field(default=(), compare=False)
    """The same of the completion."""

    @property
    def is_empty(self) -> bool:
        """Whether the example is empty: no text, or empty columns in the template."""
        parts = [self.completion[a:b] for a, b in self.completion_rows] or [self.completion]
        return all(not part or part.isspace() for part in parts)


@dataclass(frozen=True)
class Template:
    """A column, or a text with {columns}."""

    key: str
    source: str
    segments: tuple[tuple[str, str | None], ...]
    """(literal text, the column that follows it or None)."""

    @property
    def columns(self) -> list[str]:
        return [column for _, column in self.segments if column is not None]

    def render(self, row: LocatedRow) -> tuple[str, tuple[Span, ...]]:
        """The text of a row, and the spans of its columns in it. A missing column is empty.

        Raises UserError for a value that is neither text nor number, with the row's place.
        """
        parts: list[str] = []
        spans: list[Span] = []
        length = 0
        for literal, column in self.segments:
            cell = "" if column is None else self._cell(row, column)
            parts += [literal, cell]
            length += len(literal) + len(cell)
            if column is not None:
                spans.append((length - len(cell), length))
        return "".join(parts), tuple(spans)

    def _cell(self, row: LocatedRow, column: str) -> str:
        try:
            return cell_text(row.cells.get(column))
        except ValueError as error:
            raise user_error(self.key, self.source, f"{row.where}: column {column!r} {error}") from None


def cell_text(value: Any) -> str:
    """A cell as text; missing values (None, NaN) are empty.

    Raises ValueError, with the reason, for a value that is neither text nor a finite number.
    """
    if value is None or (isinstance(value, float) and isnan(value)):
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"holds a {type(value).__name__}: it must be text or a number")
    if isinstance(value, float) and isinf(value):
        raise ValueError(f"holds {value}: it must be text or a finite number")
    if not isinstance(value, str):
        return _digits(value)
    # JSON can contain lone surrogates, which tokenizers do not accept
    return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _digits(value: float) -> str:
    try:
        return str(value)
    except ValueError:
        raise ValueError("holds a whole number of thousands of digits: write it as text") from None


@dataclass(frozen=True)
class Formatter:
    """Formats rows. prompt: None if everything is learnt."""

    prompt: Template | None
    completion: Template

    def __call__(self, row: LocatedRow) -> PromptCompletion:
        prompt, prompt_rows = self.prompt.render(row) if self.prompt else ("", ())
        completion, completion_rows = self.completion.render(row)
        return PromptCompletion(prompt, completion, prompt_rows, completion_rows)

    @property
    def setting(self) -> JsonValue:
        """The templates, for the key of the cache."""
        prompt = None if self.prompt is None else self.prompt.source
        return [prompt, self.completion.source]

    def check(self, rows: RowsOutline, rows_name: str) -> None:
        """Raises UserError if a column is in no row. Rows that lack it have an empty text there.

        rows_name: of the rows, for the error, such as `training`.
        """
        problems: list[Problem] = []
        templates = [self.completion] if self.prompt is None else [self.prompt, self.completion]
        for template in templates:
            for column in template.columns:
                if column not in rows.columns:
                    hint = (
                        f"{column!r} is not a column of the {rows_name} rows; they have "
                        f"{choices(rows.columns)}."
                    )
                    hint += _identifiers_hint(rows)
                    problems.append(
                        Problem(template.key, template.source, hint + did_you_mean(column, rows.columns))
                    )
        if problems:
            raise UserError(*problems)


def make_formatter(task: TaskConfig, rows: RowsOutline, key: str) -> Formatter:
    """The formatter of a task, checked against its training rows.

    Default: the columns `prompt` and `completion` if the rows have both, else `text`. Raises UserError if a
    column is missing or a template is malformed.
    """
    prompt, completion, text = task.prompt, task.completion, task.text
    if prompt is None and text is None:
        if {"prompt", "completion"} <= set(rows.columns):
            prompt, completion = "prompt", "completion"
        elif "text" in rows.columns:
            text = "text"
        else:
            columns = ", ".join(rows.columns)
            hint = f"name the columns: text, or prompt and completion; the rows have {columns}"
            if set(rows.columns) >= PAIR:
                hint += ". For pairs of completions set objective: dpo (or ipo, orpo, sft)"
            if explained := _identifiers_hint(rows):
                hint += f".{explained}"
            raise user_error(key, None, hint)
    if text is not None:
        formatter = Formatter(None, parse_template(str(text), f"{key}.text"))
    else:
        formatter = Formatter(
            parse_template(str(prompt), f"{key}.prompt"), parse_template(str(completion), f"{key}.completion")
        )
    formatter.check(rows, "training")
    return formatter


def parse_template(source: str, key: str) -> Template:
    """A template from text with {columns}, or from the name of a column. Raises UserError if its braces are
    malformed."""
    if "{" not in source:
        return Template(key, source, (("", source),))
    try:
        parsed = list(string.Formatter().parse(source))
    except ValueError as error:
        raise user_error(
            key, source, f"is not a template: {error} (a literal brace is written twice)"
        ) from None
    for _, column, spec, conversion in parsed:
        if column == "" or spec or conversion:
            raise user_error(key, source, "is not a template: braces must contain the name of a column only")
    return Template(key, source, tuple((text, column) for text, column, _, _ in parsed))


def _identifiers_hint(rows: RowsOutline) -> str:
    """A sentence for rows that identify files of The Stack v2 instead of holding their text; else nothing."""
    if rows.first is None:
        return ""
    row = rows.first.cells
    files = row.get("files")
    first = files[0] if isinstance(files, list) and files else None
    if IDENTIFIER in row or (isinstance(first, dict) and IDENTIFIER in first):
        script = f"{stack_v2_script()} --ids"
        return f" They identify files of The Stack v2: `{script}` downloads them (docs/data.md)."
    return ""
