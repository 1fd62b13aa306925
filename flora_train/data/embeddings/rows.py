"""Rows of embeddings: pairs of an anchor and a positive, and triplets with a negative."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import Problem, UserError, choices, did_you_mean, user_error
from flora_train.config.json_format import JsonObject
from flora_train.config.task_schema import TaskConfig
from flora_train.data.documents import EncodedDocument, EncodedExample, Fate, LocatedRow, RowsOutline
from flora_train.data.templates import Template, parse_template
from flora_train.data.text_encoder import TextEncoder

ROWS_AT_ONCE = 256
"""Rows that are tokenized in one call."""
NAMES = ("anchor", "positive", "negative")


@dataclass(frozen=True)
class _Texts:
    """The texts of a row, and what the row becomes if it is left out."""

    texts: tuple[str, ...]
    fate: Fate


@dataclass(frozen=True)
class _Encoded:
    """The tokens of a text."""

    tokens: NDArray[np.int32]
    cut: bool
    """Whether the text has more tokens than training.max_length."""


class EmbeddingRowEncoder:
    """Encodes rows of pairs or triplets. Each text is tokenized as by the tokenizer alone, with the special
    tokens that it puts around a text, as sentence-transformers does.

    rows: the training rows. Raises UserError if a column is missing or a template is malformed.
    """

    def __init__(
        self, task: TaskConfig, tokenizer: Any, *, rows: RowsOutline, max_length: int, key: str
    ) -> None:
        self.key, self.tokenizer, self.max_length = key, tokenizer, max_length
        self.truncation: Fate = task.truncation
        self.special_tokens = task.special_tokens
        sources = (task.anchor, task.positive, task.negative)
        self.templates: list[Template] = [
            parse_template(source, f"{key}.{name}")
            for name, source in zip(NAMES, sources, strict=True)
            if source is not None
        ]
        self._special = TextEncoder(tokenizer).special_pattern
        self._around = int(tokenizer.num_special_tokens_to_add())
        """Tokens that the tokenizer puts around a text."""
        if max_length <= self._around:
            hint = f"has no room for text beside the {self._around} special tokens of the tokenizer: raise it"
            raise user_error("training.max_length", max_length, hint)
        self.check(rows, "training")

    @property
    def setting(self) -> JsonObject:
        return {
            "format": "embeddings",
            "texts": [template.source for template in self.templates],
            "max_length": self.max_length,
            "truncation": self.truncation,
            "special_tokens": self.special_tokens,
        }

    def check(self, rows: RowsOutline, split: str) -> None:
        problems: list[Problem] = []
        for template in self.templates:
            for column in template.columns:
                if column in rows.columns:
                    continue
                hint = f"{column!r} is not a column of the {split} rows; they have {choices(rows.columns)}."
                hint += did_you_mean(column, rows.columns)
                problems.append(Problem(template.key, template.source, hint))
        if problems:
            raise UserError(*problems)

    def encode(self, rows: Sequence[LocatedRow]) -> Iterator[EncodedExample]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            read = [self._texts(row) for row in chunk]
            encoded = iter(self._tokenize([text for one in read for text in one.texts]))
            for one in read:
                yield self._example(one, [next(encoded) for _ in one.texts])

    def _texts(self, row: LocatedRow) -> _Texts:
        """The texts of a row: none if the anchor or the positive is blank."""
        texts = []
        blank = False
        for template, name in zip(self.templates, NAMES, strict=False):
            text, spans = template.render(row)
            for column in template.columns:
                if row.cells.get(column) is None:
                    raise self._missing(row, template, name, f"has no {column!r}")
            if all(not text[begin:end].strip() for begin, end in spans):
                if name == "negative":
                    raise self._missing(row, template, name, "is blank")
                blank = True
            texts.append(text)
        if blank:
            return _Texts((), "empty")
        self._check_different(row, texts)
        return _Texts(tuple(texts), "whole")

    def _missing(self, row: LocatedRow, template: Template, name: str, problem: str) -> UserError:
        hint = f"{problem} in {row.where}: give the text, or remove the row"
        if name == "negative":
            hint = (
                f"{problem} in {row.where}, and all rows of a task need one: give the negative, "
                "or make a task of pairs of the rows without"
            )
        return user_error(template.key, template.source, hint)

    def _check_different(self, row: LocatedRow, texts: Sequence[str]) -> None:
        """Raises UserError if a text of the row is the same as another one."""
        for i, text in enumerate(texts):
            for j in range(i):
                if text == texts[j]:
                    template = self.templates[i]
                    hint = (
                        f"is the same text as {NAMES[j]} in {row.where}, from which nothing is "
                        "learnt: remove the row"
                    )
                    raise user_error(template.key, template.source, hint)

    def _tokenize(self, texts: list[str]) -> list[_Encoded]:
        """The tokens of each text, cut off at the tokenizer's side if they are truncated."""
        if not texts:
            return []
        encoded = [_Encoded(np.array(ids, dtype=np.int32), False) for ids in self._ids(texts)]
        long = [i for i, one in enumerate(encoded) if len(one.tokens) > self.max_length]
        if not long:
            return encoded
        short = self._ids([texts[i] for i in long], truncation=True, max_length=self.max_length)
        for i, ids in zip(long, short, strict=True):
            encoded[i] = _Encoded(np.array(ids, dtype=np.int32), True)
        return encoded

    def _ids(self, texts: list[str], **options: Any) -> list[list[int]]:
        encoded = self.tokenizer(
            texts,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=not self.special_tokens,
            verbose=False,
            **options,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _example(self, read: _Texts, encoded: Sequence[_Encoded]) -> EncodedExample:
        """One example of the encoded texts of a row. Rows whose texts have the same tokens teach nothing."""
        written = Counter[str]()
        for text in read.texts:
            written.update(self._special.findall(text))
        fate = read.fate
        contents = [one.tokens.tobytes() for one in encoded]
        if any(len(one.tokens) <= self._around for one in encoded) or len(set(contents)) < len(contents):
            fate = "empty"
        elif any(one.cut for one in encoded):
            fate = self.truncation
        if fate in ("empty", "drop"):
            return EncodedExample((), fate, written)
        documents = tuple(EncodedDocument(one.tokens, (), 0) for one in encoded)
        return EncodedExample(documents, fate, written)
