"""Rows of labelled texts for a causal language model, which learns the word of a label after a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import user_error
from flora_train.config.json_format import JsonObject
from flora_train.config.task_schema import TaskConfig
from flora_train.data.documents import EncodedDocument, EncodedExample, Fate, LocatedRow, RowsOutline
from flora_train.data.labels.reader import LabelReader
from flora_train.data.text_encoder import TextEncoder
from flora_train.data.token_cache import Encoded
from flora_train.data.tokenizer_copies import Place

ROWS_AT_ONCE = 256
"""Rows that are tokenized in one call."""
CHARACTERS_A_TOKEN = 16
"""Characters per token of max_length up to which a long text is read."""


@dataclass(frozen=True)
class WordPlace:
    """What stands before a word, on which its tokens depend."""

    place: Place
    is_spaced: bool
    """Whether a space is written before the word."""
    is_stripped: bool
    """Whether the last token of the prompt takes the space."""


PLACES: tuple[Place, ...] = ("start", "token", "text")
WORD_PLACES = tuple(
    WordPlace(place, is_spaced, is_stripped)
    for place in PLACES
    for is_spaced in (False, True)
    for is_stripped in (False, True)
)
"""All of them, by the number that is stored beside the label of an example."""
USUAL_PLACE = WordPlace("text", True, False)


class LabelWords:
    """The words of labels as tokens. Raises UserError for words whose tokens do not tell them apart."""

    def __init__(self, task: TaskConfig, encoder: TextEncoder, key: str) -> None:
        self.encoder, self.key = encoder, key
        self.labels = tuple(task.labels or task.verbalizer or ())
        verbalizer = task.verbalizer or {}
        self.words = tuple(verbalizer[label] for label in self.labels)
        self._tokens: dict[WordPlace, tuple[NDArray[np.int32], ...]] = {}

    def text(self, number: int, place: WordPlace) -> str:
        """The text of the word of a label."""
        word = self.words[number]
        if place.is_spaced and not word[0].isspace():
            word = f" {word}"
        return word.lstrip() if place.is_stripped else word

    def tokens(self, place: WordPlace) -> tuple[NDArray[np.int32], ...]:
        """The tokens of the words of all labels."""
        if place not in self._tokens:
            texts = [(self.text(number, place), ()) for number in range(len(self.words))]
            encoded = [one.ids for one in self.encoder.encode(texts, place.place)]
            self._check(encoded)
            self._tokens[place] = tuple(encoded)
        return self._tokens[place]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest word."""
        return max(len(tokens) for tokens in self.tokens(USUAL_PLACE))

    def _check(self, words: Sequence[NDArray[np.int32]]) -> None:
        first: dict[tuple[int, ...], int] = {}
        key = f"{self.key}.verbalizer"
        for number, tokens in enumerate(words):
            if not len(tokens):
                hint = f"the word of {self.labels[number]!r} has no token in this base: choose another one"
                raise user_error(key, self.words[number], hint)
            other = first.setdefault(tuple(tokens.tolist()), number)
            if other != number:
                hint = (
                    f"has the same tokens as {self.words[other]!r}, the word of {self.labels[other]!r}: "
                    f"choose another word for {self.labels[number]!r}"
                )
                raise user_error(key, self.words[number], hint)
        for word, number in first.items():
            begin = next((first[word[:n]] for n in range(1, len(word)) if word[:n] in first), None)
            if begin is not None:
                hint = (
                    f"begins with the tokens of {self.words[begin]!r}, the word of {self.labels[begin]!r}, "
                    "and could never be more probable: choose words of which none begins another"
                )
                raise user_error(key, self.words[number], hint)


class VerbalizerRowEncoder:
    """Encodes rows as prompt + word of the label + end token, of which word and end token are learnt.

    A prompt that is too long loses the end of the longest of its columns, so that what the template writes
    after it stays. rows: the training rows. Raises UserError if a column is missing, a template is malformed,
    or words cannot be told apart.
    """

    def __init__(
        self, task: TaskConfig, tokenizer: Any, *, rows: RowsOutline, max_length: int, key: str
    ) -> None:
        self.task, self.max_length, self.eos = task, max_length, int(tokenizer.eos_token_id)
        self.reader = LabelReader(task, key)
        self.reader.check(rows, "training")
        self.encoder = TextEncoder(tokenizer, task.special_tokens)
        self.words = LabelWords(task, self.encoder, key)
        self.numbers = {label: i for i, label in enumerate(self.words.labels)}
        self.room = max_length - self.words.longest - 1

    @property
    def setting(self) -> JsonObject:
        return {
            "format": "verbalizer",
            "label": self.reader.column,
            "prompt": list(self.reader.sources),
            "words": [list(pair) for pair in zip(self.words.labels, self.words.words, strict=True)],
            "max_length": self.max_length,
            "truncation": self.task.truncation,
            "special_tokens": self.task.special_tokens,
        }

    def check(self, rows: RowsOutline, split: str) -> None:
        self.reader.check(rows, split)

    def encode(self, rows: Sequence[LocatedRow]) -> Iterator[EncodedExample]:
        (template,) = self.reader.templates
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            prompts = [template.render(row) for row in chunk]
            encoded = self.encoder.encode(prompts, more=True, limit=self.max_length)
            for row, (prompt, spans), one in zip(chunk, prompts, encoded, strict=True):
                (label,) = self.reader.read(row).labels
                yield self._example(self.numbers[label], prompt, spans, one)

    def _example(
        self, number: int, prompt: str, spans: Sequence[tuple[int, int]], encoded: Encoded
    ) -> EncodedExample:
        fate: Fate = "whole"
        written = encoded.written
        head = self.encoder.with_start(encoded.ids.tolist())
        if len(head) > self.room:
            if self.task.truncation == "drop":
                return EncodedExample((), "drop", written)
            head, written = self._cut(prompt, spans)
            fate = "truncate"
        place = self._place(head, prompt)
        word = self.words.tokens(place)[number]
        if not head or len(head) + len(word) + 1 > self.max_length:
            return EncodedExample((), "prompt_too_long", written)
        tokens = np.concatenate([np.array(head, dtype=np.int32), word, np.array([self.eos], dtype=np.int32)])
        label_bytes = len(self.words.text(number, place).encode())
        document = EncodedDocument(tokens, [(len(head), len(tokens))], label_bytes)
        target = (float(number), float(WORD_PLACES.index(place)))
        return EncodedExample((document,), fate, written, target=target)

    def _place(self, head: list[int], prompt: str) -> WordPlace:
        """What stands before the word after a prompt."""
        is_spaced = not prompt[-1:].isspace()
        stripped, _ = self.encoder.after(head, " a", ())
        return WordPlace(self.encoder.place_after(head, prompt), is_spaced, stripped == "a")

    def _cut(self, prompt: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], Counter[str]]:
        """The tokens of a prompt without the end of the longest of its columns, as far as it is necessary."""
        begin, end = max(spans, key=lambda span: span[1] - span[0])
        kept = min(end - begin, CHARACTERS_A_TOKEN * max(1, self.room))
        while True:
            text, moved = _without_end(prompt, spans, begin + kept, end)
            (encoded,) = self.encoder.encode([(text, moved)], more=True)
            head = self.encoder.with_start(encoded.ids.tolist())
            excess = len(head) - self.room
            if excess <= 0 or not kept:
                return head, encoded.written
            kept -= min(kept, max(1, int(excess * len(text) / len(head))))


def _without_end(
    prompt: str, spans: Sequence[tuple[int, int]], cut: int, end: int
) -> tuple[str, list[tuple[int, int]]]:
    """A prompt without its characters from `cut` to `end`, and the spans of its columns."""
    gone = end - cut

    def moved(position: int) -> int:
        return position if position <= cut else max(cut, position - gone)

    return prompt[:cut] + prompt[end:], [(moved(a), moved(b)) for a, b in spans]
