"""Completions of a prompt as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from flora_train.config.json_format import JsonValue
from flora_train.config.task_schema import TaskConfig
from flora_train.data.documents import EncodedExample, LocatedRow
from flora_train.data.templates import Formatter, Template, parse_template
from flora_train.data.tokenization import ExampleTokenizer

ROWS_AT_ONCE = 256
"""Rows that are tokenized in one call."""


class CompletionTokenizer(Protocol):
    """Tokenizes the completions of rows."""

    @property
    def setting(self) -> JsonValue:
        """All that tokens depend on, beside the tokenizer."""
        ...

    @property
    def columns(self) -> Mapping[str, str]:
        """Column that rows must have -> its configuration key."""
        ...

    def are_same(self, row: LocatedRow) -> bool:
        """Whether the completions of a row are the same."""
        ...

    def encode(self, rows: Sequence[LocatedRow]) -> Iterator[list[EncodedExample]]:
        """For each row, each of its completions after the prompt."""
        ...


class TextCompletions:
    """Tokenizes completions that are text. prompt, completions: columns, or templates with {columns}."""

    def __init__(
        self,
        task: TaskConfig,
        tokenizer: Any,
        prompt: str | None,
        completions: Sequence[str],
        *,
        max_length: int,
        key: str,
    ) -> None:
        names = ("chosen", "rejected") if len(completions) > 1 else ("completion",)
        self.prompt: Template | None = None
        if prompt is not None:
            self.prompt = parse_template(prompt, f"{key}.prompt")
        self.templates = [
            parse_template(source, f"{key}.{name}") for source, name in zip(completions, names, strict=True)
        ]
        self.formatters = [Formatter(self.prompt, template) for template in self.templates]
        self.tokenize = ExampleTokenizer(
            tokenizer, max_length=max_length, truncation=task.truncation, special_tokens=task.special_tokens
        )
        self.setting: JsonValue = {
            "formats": [formatter.setting for formatter in self.formatters],
            "max_length": max_length,
            "truncation": task.truncation,
            "special_tokens": task.special_tokens,
        }

    @property
    def columns(self) -> dict[str, str]:
        columns: dict[str, str] = {}
        for template in (self.prompt, *self.templates):
            if template is not None:
                columns |= dict.fromkeys(template.columns, template.key)
        return columns

    def are_same(self, row: LocatedRow) -> bool:
        texts = {template.render(row)[0] for template in self.templates}
        return len(texts) < len(self.templates)

    def encode(self, rows: Sequence[LocatedRow]) -> Iterator[list[EncodedExample]]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            examples = [formatter(row) for row in chunk for formatter in self.formatters]
            encoded = self.tokenize(examples)
            for _ in chunk:
                yield [next(encoded) for _ in self.formatters]
