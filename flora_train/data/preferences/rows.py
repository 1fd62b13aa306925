"""Rows of preferences: pairs of a chosen and a rejected completion, and completions with a label."""

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
from flora_train.data.chat.rows import check_chat_keys
from flora_train.data.documents import EncodedExample, Fate, LocatedRow, RowsOutline
from flora_train.data.preferences.messages import MessageCompletions, holds_messages
from flora_train.data.preferences.text import CompletionTokenizer, TextCompletions

LEFT_OUT: tuple[Fate, ...] = ("empty", "prompt_too_long", "drop")
"""What happens to a preference if one of its completions is left out, by precedence."""


@dataclass(frozen=True)
class PreferenceColumns:
    """The columns, or templates with {columns}, of preferences."""

    prompt: str | None
    """None: completions have no prompt of their own."""
    completions: tuple[str, ...]
    """Chosen and rejected, or the one completion."""
    label: str | None
    """None: rows are pairs."""


class PreferenceRowEncoder:
    """Encodes rows of preferences. Both completions of a pair continue the same tokens of the prompt.

    rows: the training rows, whose columns decide the defaults. Raises UserError if a column is missing or a
    template is malformed.
    """

    def __init__(
        self, task: TaskConfig, tokenizer: Any, *, rows: RowsOutline, max_length: int, key: str
    ) -> None:
        self.key = key
        for name in ("messages", "learn"):
            if getattr(task, name) is not None:
                hint = "has no meaning for preferences, whose completions are learnt: remove it"
                raise user_error(f"{key}.{name}", getattr(task, name), hint)
        check_text_keys(task, key)
        self.columns = _columns(task, rows, key)
        prompt, completions = self.columns.prompt, self.columns.completions
        make: type[TextCompletions] | type[MessageCompletions] = TextCompletions
        if holds_messages(rows, prompt, completions):
            make = MessageCompletions
        else:
            check_chat_keys(task, rows, key)
        self.completions: CompletionTokenizer = make(
            task, tokenizer, prompt, completions, max_length=max_length, key=key
        )
        self.check(rows, "training")

    @property
    def setting(self) -> JsonObject:
        return {
            "format": "preferences",
            "completions": self.completions.setting,
            "label": self.columns.label,
        }

    def check(self, rows: RowsOutline, split: str) -> None:
        problems: list[Problem] = []
        needed = dict(self.completions.columns)
        if self.columns.label is not None:
            needed[self.columns.label] = f"{self.key}.label"
        for column, key in needed.items():
            if column not in rows.columns:
                hint = f"is not a column of the {split} rows; they have {choices(rows.columns)}."
                problems.append(Problem(key, column, hint + did_you_mean(column, rows.columns)))
        if problems:
            raise UserError(*problems)

    def encode(self, rows: Sequence[LocatedRow]) -> Iterator[EncodedExample]:
        for row in rows:
            self._check_row(row)
        encoded = self.completions.encode(rows)
        for row, documents in zip(rows, encoded, strict=True):
            yield self._example(row, documents)

    def _check_row(self, row: LocatedRow) -> None:
        for column, key in self.completions.columns.items():
            is_prompt = key.endswith(".prompt")
            if row.cells.get(column) is None and not is_prompt:
                hint = f"has no {column!r} in {row.where}: give the completion, or remove the row"
                raise user_error(key, None, hint)

    def _example(self, row: LocatedRow, documents: Sequence[EncodedExample]) -> EncodedExample:
        """One example of the encoded completions of a row."""
        written = sum((one.special_tokens for one in documents), Counter[str]())
        label = None
        if self.columns.label is not None:
            label = _label(row, self.columns.label, f"{self.key}.label")
        elif self.completions.are_same(row):
            raise self._same(row)
        for reason in LEFT_OUT:
            if any(one.fate == reason for one in documents):
                return EncodedExample((), reason, written)
        if any(not _learns(one) for one in documents):
            return EncodedExample((), "empty", written)
        tokens = [one.documents[0].tokens for one in documents]
        fate: Fate = "whole"
        if any(one.fate == "truncate" for one in documents):
            fate = "truncate"
        if len(tokens) > 1 and np.array_equal(tokens[0], tokens[1]):
            if fate == "whole":
                raise self._same(row, " once they are tokenized")
            return EncodedExample((), "drop", written)  # cut off where they differ
        return EncodedExample(tuple(one.documents[0] for one in documents), fate, written, label)

    def _same(self, row: LocatedRow, condition: str = "") -> UserError:
        """The error for a row whose completions are the same. condition: says when they are."""
        chosen, rejected = self.columns.completions
        hint = f"is the same as {chosen!r} in {row.where}{condition}: a pair needs two; remove the row"
        return user_error(f"{self.key}.rejected", rejected, hint)


def _learns(example: EncodedExample) -> bool:
    """Whether some token of its document is predicted."""
    return any(max(begin, 1) < end for begin, end in example.documents[0].spans)


def _label(row: LocatedRow, column: str, key: str) -> bool:
    value = row.cells.get(column)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):  # tables have text only
        return value.strip().lower() == "true"
    given = "is missing"
    if value is not None:
        given = f"is {_shorten(value)}, which is neither true nor false,"
    hint = f"{given} in {row.where}: write true for a good completion, false for a bad one"
    raise user_error(key, column, hint)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _columns(task: TaskConfig, rows: RowsOutline, key: str) -> PreferenceColumns:
    prompt = task.prompt
    if prompt is None and "prompt" in rows.columns:
        prompt = "prompt"
    if task.objective == "kto":
        return PreferenceColumns(prompt, (task.completion or "completion",), task.label or "label")
    return PreferenceColumns(prompt, (task.chosen or "chosen", task.rejected or "rejected"), None)


def has_pairs(task: TaskConfig, columns: Sequence[str]) -> bool:
    """Whether the rows of a supervised task are pairs, of which the chosen completion is learnt."""
    if task.chosen is not None or task.rejected is not None:
        return True
    names_text = task.text is not None or task.completion is not None
    return not names_text and {"chosen", "rejected"} <= set(columns)


def check_text_keys(task: TaskConfig, key: str) -> None:
    """Raises UserError if a task whose rows are pairs has keys that are for text only."""
    if task.packing:
        hint = "has no meaning for pairs, of which each is a row of its own: remove it"
        raise user_error(f"{key}.packing", True, hint)
    if task.truncation == "split":
        hint = "cannot divide the completions of a pair: use truncate or drop"
        raise user_error(f"{key}.truncation", task.truncation, hint)


def check_labels(labels: NDArray[np.bool_], key: str) -> None:
    """Raises UserError if all training rows have the same label."""
    if not len(labels) or labels.any() != labels.all():
        return
    value = str(bool(labels[0])).lower()
    hint = f"is {value} in all training rows, and kto learns from the difference: give rows of both kinds"
    raise user_error(f"{key}.label", None, hint)
