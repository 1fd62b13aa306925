"""Rows of text: prompt and completion, or a text that is learnt as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flora_train.config.json_format import JsonObject
from flora_train.config.task_schema import TaskConfig
from flora_train.data.documents import EncodedExample, LocatedRow, RowsOutline
from flora_train.data.templates import make_formatter
from flora_train.data.tokenization import ExampleTokenizer


class TextRowEncoder:
    """Encodes rows of text.

    rows: the training rows, whose columns decide the default format. Raises UserError if a column is missing
    or a template is malformed.
    """

    def __init__(
        self, task: TaskConfig, tokenizer: Any, *, rows: RowsOutline, max_length: int, key: str
    ) -> None:
        self.formatter = make_formatter(task, rows, key)
        self.task, self.max_length = task, max_length
        self.tokenize = ExampleTokenizer(
            tokenizer, max_length=max_length, truncation=task.truncation, special_tokens=task.special_tokens
        )

    @property
    def setting(self) -> JsonObject:
        return {
            "format": self.formatter.setting,
            "max_length": self.max_length,
            "truncation": self.task.truncation,
            "special_tokens": self.task.special_tokens,
        }

    def check(self, rows: RowsOutline, split: str) -> None:
        self.formatter.check(rows, split)

    def encode(self, rows: Sequence[LocatedRow]) -> Iterator[EncodedExample]:
        return self.tokenize([self.formatter(row) for row in rows])
