"""Rows of labelled texts: a text, or a pair of texts, with what it is labelled with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from flora_train.config.json_format import JsonObject
from flora_train.config.task_schema import TaskConfig
from flora_train.data.documents import EncodedDocument, EncodedExample, Fate, LocatedRow, RowsOutline
from flora_train.data.labels.reader import LabelledRow, LabelReader
from flora_train.data.labels.tokenize import LabelledTextTokenizer, TokenizedText

logger = logging.getLogger(__name__)

IGNORE = -100
"""The label of tokens that have none, which cross_entropy ignores."""
ROWS_AT_ONCE = 256
"""Rows that are tokenized in one call."""


class LabelRowEncoder:
    """Encodes rows of labelled texts.

    task: with its labels (see `with_labels`). rows: the training rows. Raises UserError if a column is
    missing or a template is malformed.
    """

    def __init__(
        self, task: TaskConfig, tokenizer: Any, *, rows: RowsOutline, max_length: int, key: str
    ) -> None:
        self.task, self.max_length = task, max_length
        self.reader = LabelReader(task, key)
        self.reader.check(rows, "training")
        self.numbers = {label: i for i, label in enumerate(task.labels or ())}
        self.is_tagging = self.reader.task_type == "tokens"
        self.tokenize = LabelledTextTokenizer(
            tokenizer, max_length, special_tokens=task.special_tokens, is_tagging=self.is_tagging
        )
        self.tokenize.check_room(len(self.reader.sources))
        if len(self.reader.sources) > 1 and not self.tokenize.separates_pairs:
            first, second = self.reader.sources
            logger.warning(
                f"{key}.text: this tokenizer writes nothing between the texts of a pair; a template does, "
                f"such as text: '{{{first}}} {{{second}}}' with a line end or words between them"
            )

    @property
    def setting(self) -> JsonObject:
        return {
            "format": "labels",
            "type": self.reader.task_type,
            "label": self.reader.column,
            "separator": self.task.label_separator,
            "labels": list(self.numbers),
            "text": list(self.reader.sources),
            "max_length": self.max_length,
            "truncation": self.task.truncation,
            "special_tokens": self.task.special_tokens,
        }

    def check(self, rows: RowsOutline, split: str) -> None:
        self.reader.check(rows, split)

    def encode(self, rows: Sequence[LocatedRow]) -> Iterator[EncodedExample]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            contents = [self.reader.read(row) for row in rows[start : start + ROWS_AT_ONCE]]
            tokenized = self.tokenize(contents, is_tagging=self.is_tagging)
            for content, text in zip(contents, tokenized, strict=True):
                yield self._example(content, text)

    def _example(self, content: LabelledRow, text: TokenizedText) -> EncodedExample:
        if not len(text.tokens) or (self.is_tagging and all(word is None for word in text.words)):
            return EncodedExample((), "empty", text.special_tokens)  # the tokenizer has no token for it
        fate: Fate = "whole"
        if text.over_long:
            fate = "drop" if self.task.truncation == "drop" else "truncate"
        if fate == "drop":
            return EncodedExample((), fate, text.special_tokens)
        document = EncodedDocument(text.tokens, (), 0, text.types)
        target = self._target(content, text)
        return EncodedExample((document,), fate, text.special_tokens, target=target)

    def _target(self, content: LabelledRow, text: TokenizedText) -> tuple[float, ...]:
        """The numbers of `LabelSplit.target`."""
        if self.reader.task_type == "regression":
            return (content.number,)
        if self.reader.task_type == "tokens":
            return tuple(self._of_word(content, word) for word in text.words)
        numbers = [self.numbers[label] for label in content.labels]
        if self.reader.task_type == "single":
            return (float(numbers[0]),)
        has = set(numbers)
        return tuple(float(number in has) for number in range(len(self.numbers)))

    def _of_word(self, content: LabelledRow, word: int | None) -> float:
        return float(IGNORE) if word is None else float(self.numbers[content.labels[word]])
