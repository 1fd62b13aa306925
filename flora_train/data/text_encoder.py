"""Encodes text whose special tokens are tokens in templates and ordinary text in rows, and text that
continues a prompt."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from flora_train.config.errors import user_error
from flora_train.data.token_cache import (
    Encoded,
    Spans,
    Tokens,
    between,
    byte_counter,
    counter_of_ends,
    joined,
    longest_whole,
    windows,
)
from flora_train.data.tokenizer_copies import (
    Place,
    copy_tokenizer,
    drops_spaces,
    pipeline_at,
    pipeline_of,
    placeholder,
    special_tokens_of,
    steps_of,
)


class TextEncoder:
    """A tokenizer for text that is partly written by a recipe and partly by rows.

    special_tokens: special tokens that are written in rows are tokens as well. Text without special tokens in
    rows is tokenized exactly as the tokenizer itself does it.
    """

    def __init__(self, tokenizer: Any, special_tokens: bool = False) -> None:
        self.tokenizer, self.special_tokens = tokenizer, special_tokens
        self.start = start_tokens(tokenizer)
        self.special = special_tokens_of(tokenizer)
        self._splits = {*self.special, *(int(i) for i in tokenizer.added_tokens_decoder)}
        self._strips_right = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.rstrip}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._pipeline = {} if self._backend is None else pipeline_of(self._backend)
        self._hidden_tokens = self._find_hidden_tokens()
        self.is_slow = self._backend is None
        self._copies: dict[tuple[Place, bool, bool], Any] = {}

    def prompt(self, text: str, special_tokens: bool) -> list[int]:
        """Token ids of a prompt as in training: start tokens (once, even if the text contains them) and the
        text.

        special_tokens: special tokens in the text are tokens (text of a recipe), not text.
        """
        rows: Spans = [(0, len(text))]
        if special_tokens:
            rows = ()
        (encoded,) = self.encode([(text, rows)], more=True)
        return self.with_start(encoded.ids.tolist())

    def decode_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text of `tokens` after a prompt. Tokenizers drop the first space of what they take for a whole
        text."""
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        both = self.tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
        if not before or not both.startswith(before):
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        text = both[len(before) :]
        return (
            text.removeprefix(" ")
            if self.place_after(prompt) == "token" and self._spaced_after_token
            else text
        )

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """A pattern of the texts of all special tokens; it matches nothing if there are none."""
        texts = sorted({text.strip() for text in self.special.values()} - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")

    @cached_property
    def _spaced_after_token(self) -> bool:
        """Whether the tokenizer puts a space before a text that follows a special token."""
        (encoded,) = self.encode([("a", ())], place="token")
        first = self.tokenizer.convert_ids_to_tokens(encoded.ids[:1].tolist())
        return bool(first) and str(first[0])[:1] in ("\u2581", "\u0120")

    def with_start(self, ids: list[int]) -> list[int]:
        """`ids` after the start tokens, which are not repeated."""
        if self.start and ids[: len(self.start)] == self.start:
            return ids
        return self.start + ids

    def place_after(self, prompt: Tokens, text: str = "") -> Place:
        """The place of a text after these tokens. text: the text that they were made of."""
        if not len(prompt) or (text[-1:].isspace() and drops_spaces(self._pipeline)):
            return "start"
        return "token" if int(prompt[-1]) in self._splits else "text"

    def after(self, prompt: Tokens, text: str, rows: Spans) -> tuple[str, Spans]:
        """A text without the white space that the last of these tokens removes."""
        if not len(prompt) or int(prompt[-1]) not in self._strips_right:
            return text, rows
        cut = len(text) - len(text.lstrip())
        return text[cut:], [(max(0, a - cut), max(0, b - cut)) for a, b in rows]

    def encode(
        self,
        texts: Sequence[tuple[str, Spans]],
        place: Place = "start",
        more: bool = False,
        limit: int | None = None,
    ) -> list[Encoded]:
        """Tokens of each text, without start and end tokens. texts: (text, spans of it that are columns of
        rows).

        place: what precedes each text; more: whether text follows; limit: number of tokens that are used,
        None for all: of a longer text at least limit + 1 tokens are made, and not all. Raises UserError for a
        special token that cannot be read as text.
        """
        short = [i for i, (text, _) in enumerate(texts) if len(text) <= longest_whole(limit)]
        found = dict(zip(short, self._encode([texts[i] for i in short], place, more), strict=True))
        for i, (text, rows) in enumerate(texts):
            if i not in found:
                found[i] = self._in_windows(text, rows, place, more, limit)
        return [found[i] for i in range(len(texts))]

    def in_pieces(self, text: str, rows: Spans, place: Place) -> Encoded:
        """Tokens of a text in which only the special tokens between `rows` are tokens, made as those of a
        text are whose rows write special tokens. More text follows it."""
        return self._with_rows_as_text(text, rows, place, True, Counter())

    def _in_windows(self, text: str, rows: Spans, place: Place, more: bool, limit: int | None) -> Encoded:
        parts: list[Encoded] = []
        tokens, begin = 0, 0
        for begin, end in windows(text, rows):
            inside = [(max(a, begin) - begin, min(b, end) - begin) for a, b in rows if a < end and b > begin]
            here: Place = place if begin == 0 else "text"
            parts += self._encode([(text[begin:end], inside)], here, more or end < len(text))
            tokens += len(parts[-1].ids)
            if limit is not None and tokens > limit:
                break
        return joined(parts, end == len(text))

    def _find_hidden_tokens(self) -> re.Pattern[str] | None:
        """A pattern of the special tokens of a tokenizer that finds them after a space only, else None.

        The normalizer of Llama 2 puts a space before added tokens as well.
        """
        kinds = [step["type"] for step in steps_of(self._pipeline.get("normalizer"))]
        normalized = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.normalized}
        if "Prepend" not in kinds or not normalized & self.special.keys():
            return None
        return re.compile("|".join(map(re.escape, sorted(self.special.values(), key=len, reverse=True))))

    def _encode(self, texts: Sequence[tuple[str, Spans]], place: Place, more: bool) -> Iterator[Encoded]:
        if not texts:
            return
        for (text, rows), (ids, encoding) in zip(
            texts, self._tokenize([t for t, _ in texts], place, more), strict=True
        ):
            if self._hidden_tokens is not None and (found := list(self._hidden_tokens.finditer(text))):
                of_rows = [one for one in found if any(a < one.end() and b > one.start() for a, b in rows)]
                count = Counter(one.group() for one in of_rows)
                text_rows = () if self.special_tokens else rows
                yield self._with_rows_as_text(text, text_rows, place, more, count)
                continue
            written = (
                self._written(text, rows, ids, encoding)
                if not self.special.keys().isdisjoint(ids)
                else Counter[str]()
            )
            if written and not self.special_tokens:
                yield self._with_rows_as_text(text, rows, place, more, written)
            else:
                counter = byte_counter(self.tokenizer, text, ids, encoding)
                yield Encoded(np.array(ids, dtype=np.int32), counter, written)

    def _tokenize(self, texts: list[str], place: Place, more: bool) -> Iterator[tuple[list[int], Any]]:
        """(ids, encoding of the fast tokenizer or None) of each text, with special tokens wherever they are
        written."""
        copy = self._copy(place, more, with_placeholders=False)
        if copy is not None:
            yield from (
                (encoding.ids, encoding) for encoding in copy.encode_batch(texts, add_special_tokens=False)
            )
        elif self._backend is None and place == "text":
            yield from ((self._continued(text), None) for text in texts)
        else:
            found = self._native(texts)
            yield from zip(found["input_ids"], found.encodings or [None] * len(texts), strict=True)

    def _native(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            split_special_tokens=False,
        )

    def _continued(self, text: str) -> list[int]:
        """Ids of a slow tokenizer for a text after a line end, so that it puts nothing before the first
        word."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or not str(self.tokenizer.convert_ids_to_tokens(ids[:1])[0]).startswith("\u2581"):
            return ids
        for before in ("\n", "|", "a"):
            head = self.tokenizer(before, add_special_tokens=False)["input_ids"]
            both = self.tokenizer(before + text, add_special_tokens=False)["input_ids"]
            if both[: len(head)] == head:
                return both[len(head) :]
        return ids

    def _copy(self, place: Place, more: bool, with_placeholders: bool) -> Any:
        """A copy of the fast tokenizer for a place, None if the tokenizer itself reads such text
        correctly."""
        key = (place, more, with_placeholders)
        if key not in self._copies:
            pipeline = pipeline_at(self._pipeline, place, more) if self._backend is not None else {}
            needed = self._backend is not None and (with_placeholders or pipeline != self._pipeline)
            copy = None
            if needed:
                copy = copy_tokenizer(self._backend, pipeline, self.special if with_placeholders else None)
            self._copies[key] = copy
        return self._copies[key]

    def _written(self, text: str, rows: Spans, ids: Sequence[int], encoding: Any) -> Counter[str]:
        """The special tokens among `ids` that are written in rows."""
        found = Counter[str]()
        if encoding is None:
            found.update(self.special[i] for i in ids if i in self.special)
            for begin, end in between(rows, len(text)):
                literal = self.tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
                found.subtract(self.special[i] for i in literal if i in self.special)
            return +found
        for _, (begin, end), i in self._occurrences(text, ids, encoding):
            if any(a < end and b > begin for a, b in rows):
                found[self.special[i]] += 1
        return found

    def _occurrences(
        self, text: str, ids: Sequence[int], encoding: Any
    ) -> Iterator[tuple[int, tuple[int, int], int]]:
        """(position, span of the text, id) of each special token; the unknown token only where it is written
        itself."""
        for position, i in enumerate(ids):
            if i not in self.special:
                continue
            begin, end = encoding.token_to_chars(position) or (0, 0)
            at = text.find(self.special[i], begin, end)
            if at >= 0:
                yield position, (at, at + len(self.special[i])), i
            elif i != self.tokenizer.unk_token_id:
                part = text[
                    begin:end
                ]  # written otherwise (in capitals), or with white space that belongs to the token
                yield (
                    position,
                    (begin + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())),
                    i,
                )

    def _with_rows_as_text(
        self, text: str, rows: Spans, place: Place, more: bool, written: Counter[str]
    ) -> Encoded:
        """A text in which only the special tokens of the template are tokens."""
        found = (
            self._by_placeholders(text, rows, place, more)
            if self._backend is not None
            else self._piecewise(text, rows, place)
        )
        ids, counter = found
        allowed = Counter(i for _, _, i in self._template_tokens(text, rows))
        extra = Counter(i for i in ids if i in self.special and i != self.tokenizer.unk_token_id) - allowed
        if extra:
            token = self.special[next(iter(extra))]
            raise user_error(
                "model.path",
                token,
                "its tokenizer cannot read this special token of a row as text: set special_tokens: true",
            )
        return Encoded(np.array(ids, dtype=np.int32), counter, written)

    def _by_placeholders(
        self, text: str, rows: Spans, place: Place, more: bool
    ) -> tuple[list[int], Callable[[int], int]]:
        parts, shifts, end = [], [(0, 0)], 0
        for begin, after, i in self._template_tokens(text, rows):
            parts += [text[end:begin], placeholder(i)]
            end = after
            shifts.append((shifts[-1][0] + len(parts[-2]) + len(parts[-1]), end))
        encoding = self._copy(place, more, with_placeholders=True).encode(
            "".join([*parts, text[end:]]), add_special_tokens=False
        )
        at = [place for place, _ in shifts]

        def original(there: int) -> int:
            shift = bisect_right(at, there) - 1
            moved = there - at[shift] + shifts[shift][1]
            if shift + 1 < len(shifts):
                return min(moved, shifts[shift + 1][1])
            return moved

        return encoding.ids, counter_of_ends(text, [original(end) for _, end in encoding.offsets])

    def _piecewise(self, text: str, rows: Spans, place: Place) -> tuple[list[int], Callable[[int], int]]:
        """Ids of a slow tokenizer for the parts between the special tokens of the template, each tokenized
        separately."""
        ids: list[int] = []
        ends: list[int] = []
        end = 0
        for begin, after, i in [*self._template_tokens(text, rows), (len(text), len(text), None)]:
            for part in self._broken(text[end:begin]):
                more = self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                ids, end = [*ids, *more], end + len(part)
                ends += [len(text[:end].encode())] * len(more)
            if i is not None:
                ids, end = [*ids, i], after
                ends.append(len(text[:end].encode()))

        def bytes_before(n: int) -> int:
            if n >= len(ids):
                return len(text.encode())
            return ends[n - 1] if n > 0 else 0

        return ids, bytes_before

    def _broken(self, text: str) -> list[str]:
        """Parts of a text that a slow tokenizer reads without special tokens: all of it, or cut within each
        of them."""
        if not text:
            return []
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for i in ids:
            word = self.special.get(i, "")
            if i != self.tokenizer.unk_token_id and len(word) > 1 and (at := text.find(word)) >= 0:
                return [*self._broken(text[: at + 1]), *self._broken(text[at + 1 :])]
        return [text]

    def _template_tokens(self, text: str, rows: Spans) -> Iterator[tuple[int, int, int]]:
        """(begin, end, id) of the special tokens in the parts of a text that do not come from rows."""
        for begin, end in between(rows, len(text)):
            literal = text[begin:end]
            if self._hidden_tokens is not None:
                ids = {word: i for i, word in self.special.items()}
                found = self._hidden_tokens.finditer(literal)
                yield from ((begin + one.start(), begin + one.end(), ids[one.group()]) for one in found)
                continue
            if self._backend is not None:
                encoding = self._native([literal]).encodings[0]
                yield from (
                    (begin + a, begin + b, i)
                    for _, (a, b), i in self._occurrences(literal, encoding.ids, encoding)
                )
                continue
            at = 0
            for i in self.tokenizer(literal, add_special_tokens=False)["input_ids"]:
                if i in self.special and (there := literal.find(self.special[i], at)) >= 0:
                    at = there + len(self.special[i])
                    yield begin + there, begin + at, i


def start_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text: a beginning token, or none."""
    marked = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    places = (i for i in range(len(marked)) if marked[i : i + len(bare)] == bare)
    return marked[: next(places, 0)]
