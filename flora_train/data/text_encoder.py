"""Encodes text as tokens. Special tokens of a recipe's template are tokens, those in rows are text; what follows a prompt continues it."""

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
    special_tokens_of,
    stand_in,
    steps_of,
)


class TextEncoder:
    """A tokenizer for text that is partly a recipe's and partly that of rows.

    special_tokens: special tokens that are written in rows are tokens, too (rows were rendered elsewhere).
    Text without special tokens in rows is tokenised exactly as the tokenizer itself does it.
    """

    def __init__(self, tokenizer: Any, special_tokens: bool = False) -> None:
        self.tokenizer, self.special_tokens = tokenizer, special_tokens
        self.start = start_tokens(tokenizer)
        self.special = special_tokens_of(tokenizer)
        self._splits = {*self.special, *(int(i) for i in tokenizer.added_tokens_decoder)}
        self._strips_right = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.rstrip}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._pipeline = {} if self._backend is None else pipeline_of(self._backend)
        self._overlooked = self._overlooks()
        self._copies: dict[tuple[Place, bool, bool], Any] = {}

    def prompt(self, text: str, special_tokens: bool) -> list[int]:
        """What a model reads before it writes: start tokens (once, where the text has them already) and the text, as in training.
        special_tokens: those written in the text are tokens (a recipe's text), else text."""
        (encoded,) = self.encode([(text, () if special_tokens else [(0, len(text))])], more=True)
        return self.with_start(encoded.ids.tolist())

    def decode_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text of `tokens` as it follows the prompt: tokenizers drop the first space of what they take for a whole text."""
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        both = self.tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
        if not before or not both.startswith(before):
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        text = both[len(before) :]
        return text.removeprefix(" ") if self.place_after(prompt) == "token" and self._spaced_after_token else text

    @cached_property
    def _spaced_after_token(self) -> bool:
        """Whether the tokenizer puts a space before a text that follows a special token."""
        (encoded,) = self.encode([("a", ())], place="token")
        first = self.tokenizer.convert_ids_to_tokens(encoded.ids[:1].tolist())
        return bool(first) and str(first[0])[:1] in ("\u2581", "\u0120")

    def with_start(self, ids: list[int]) -> list[int]:
        """The start tokens before `ids`, but never twice."""
        return ids if self.start and ids[: len(self.start)] == self.start else self.start + ids

    def place_after(self, prompt: Tokens, text: str = "") -> Place:
        """Where a text stands that follows these tokens. text: that they were made of."""
        if not len(prompt) or (text[-1:].isspace() and drops_spaces(self._pipeline)):
            return "start"
        return "token" if int(prompt[-1]) in self._splits else "text"

    def after(self, prompt: Tokens, text: str, rows: Spans) -> tuple[str, Spans]:
        """A text as it is read after these tokens: without the white space that the last of them takes away."""
        if not len(prompt) or int(prompt[-1]) not in self._strips_right:
            return text, rows
        cut = len(text) - len(text.lstrip())
        return text[cut:], [(max(0, a - cut), max(0, b - cut)) for a, b in rows]

    def encode(
        self, texts: Sequence[tuple[str, Spans]], place: Place = "start", more: bool = False, limit: int | None = None
    ) -> list[Encoded]:
        """Tokens of each text, start and end tokens apart. Texts: (text, the parts of it that are columns of rows).

        place: what stands before each text; more: whether text follows; limit: tokens that can be used: of a text that has more, at
        least so many and one are made, and not all. Raises UserError for a special token that cannot be read as text."""
        short = [i for i, (text, _) in enumerate(texts) if len(text) <= longest_whole(limit)]
        found = dict(zip(short, self._encode([texts[i] for i in short], place, more), strict=True))
        for i, (text, rows) in enumerate(texts):
            if i not in found:
                found[i] = self._in_windows(text, rows, place, more, limit)
        return [found[i] for i in range(len(texts))]

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

    def _overlooks(self) -> re.Pattern[str] | None:
        """Llama 2's normalizer puts a space before an added token, too, which is then found behind a space only: here all are found.

        A pattern of the special tokens of such a tokenizer, else None."""
        kinds = [step["type"] for step in steps_of(self._pipeline.get("normalizer"))]
        normalized = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.normalized}
        if "Prepend" not in kinds or not normalized & self.special.keys():
            return None
        return re.compile("|".join(map(re.escape, sorted(self.special.values(), key=len, reverse=True))))

    def _encode(self, texts: Sequence[tuple[str, Spans]], place: Place, more: bool) -> Iterator[Encoded]:
        if not texts:
            return
        for (text, rows), (ids, encoding) in zip(texts, self._tokenised([t for t, _ in texts], place, more), strict=True):
            if self._overlooked is not None and (found := list(self._overlooked.finditer(text))):
                of_rows = [one for one in found if any(a < one.end() and b > one.start() for a, b in rows)]
                count = Counter(one.group() for one in of_rows)
                yield self._with_rows_as_text(text, () if self.special_tokens else rows, place, more, count)
                continue
            written = self._written(text, rows, ids, encoding) if not self.special.keys().isdisjoint(ids) else Counter[str]()
            if written and not self.special_tokens:
                yield self._with_rows_as_text(text, rows, place, more, written)
            else:
                counter = byte_counter(self.tokenizer, text, ids, encoding)
                yield Encoded(np.array(ids, dtype=np.int32), counter, written)

    def _tokenised(self, texts: list[str], place: Place, more: bool) -> Iterator[tuple[list[int], Any]]:
        """(ids, the fast tokenizer's encoding or None) of each text, with special tokens wherever they are written."""
        copy = self._copy(place, more, svd_loras=False)
        if copy is not None:
            yield from ((encoding.ids, encoding) for encoding in copy.encode_batch(texts, add_special_tokens=False))
        elif self._backend is None and place == "text":
            yield from ((self._continued(text), None) for text in texts)
        else:
            found = self._native(texts)
            yield from zip(found["input_ids"], found.encodings or [None] * len(texts), strict=True)

    def _native(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False, split_special_tokens=False
        )

    def _continued(self, text: str) -> list[int]:
        """By a slow tokenizer: as it reads the text after a line end, so that nothing is put before the first word."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or not str(self.tokenizer.convert_ids_to_tokens(ids[:1])[0]).startswith("\u2581"):
            return ids
        for before in ("\n", "|", "a"):
            head = self.tokenizer(before, add_special_tokens=False)["input_ids"]
            both = self.tokenizer(before + text, add_special_tokens=False)["input_ids"]
            if both[: len(head)] == head:
                return both[len(head) :]
        return ids

    def _copy(self, place: Place, more: bool, svd_loras: bool) -> Any:
        """A copy of the fast tokenizer for this place; None where it reads such text right itself."""
        key = (place, more, svd_loras)
        if key not in self._copies:
            pipeline = pipeline_at(self._pipeline, place, more) if self._backend is not None else {}
            needed = self._backend is not None and (svd_loras or pipeline != self._pipeline)
            special = self.special if svd_loras else None
            self._copies[key] = copy_tokenizer(self._backend, pipeline, special) if needed else None
        return self._copies[key]

    def _written(self, text: str, rows: Spans, ids: Sequence[int], encoding: Any) -> Counter[str]:
        """The special tokens among `ids` that do not stand in the template alone."""
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

    def _occurrences(self, text: str, ids: Sequence[int], encoding: Any) -> Iterator[tuple[int, tuple[int, int], int]]:
        """(position, characters of the text, id) of each special token; the unknown token only where it is written itself."""
        for position, i in enumerate(ids):
            if i not in self.special:
                continue
            begin, end = encoding.token_to_chars(position) or (0, 0)
            at = text.find(self.special[i], begin, end)
            if at >= 0:
                yield position, (at, at + len(self.special[i])), i
            elif i != self.tokenizer.unk_token_id:
                part = text[begin:end]  # written otherwise (in capitals), or with white space that belongs to the token
                yield position, (begin + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())), i

    def _with_rows_as_text(self, text: str, rows: Spans, place: Place, more: bool, written: Counter[str]) -> Encoded:
        """The text with the template's special tokens only."""
        found = self._by_stand_ins(text, rows, place, more) if self._backend is not None else self._piecewise(text, rows, place)
        ids, counter = found
        allowed = Counter(i for _, _, i in self._template_tokens(text, rows))
        extra = Counter(i for i in ids if i in self.special and i != self.tokenizer.unk_token_id) - allowed
        if extra:
            token = self.special[next(iter(extra))]
            raise user_error(
                "model.path", token, "its tokenizer cannot read this special token of a row as text: set special_tokens: true"
            )
        return Encoded(np.array(ids, dtype=np.int32), counter, written)

    def _by_stand_ins(self, text: str, rows: Spans, place: Place, more: bool) -> tuple[list[int], Callable[[int], int]]:
        parts, shifts, end = [], [(0, 0)], 0
        for begin, after, i in self._template_tokens(text, rows):
            parts += [text[end:begin], stand_in(i)]
            end = after
            shifts.append((shifts[-1][0] + len(parts[-2]) + len(parts[-1]), end))
        encoding = self._copy(place, more, svd_loras=True).encode("".join([*parts, text[end:]]), add_special_tokens=False)
        at = [place for place, _ in shifts]

        def original(there: int) -> int:
            shift = bisect_right(at, there) - 1
            moved = there - at[shift] + shifts[shift][1]
            return min(moved, shifts[shift + 1][1]) if shift + 1 < len(shifts) else moved

        return encoding.ids, counter_of_ends(text, [original(end) for _, end in encoding.offsets])

    def _piecewise(self, text: str, rows: Spans, place: Place) -> tuple[list[int], Callable[[int], int]]:
        """By a slow tokenizer: what stands between the template's tokens, each by itself."""
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
        return ids, lambda n: len(text.encode()) if n >= len(ids) else ends[n - 1] if n > 0 else 0

    def _broken(self, text: str) -> list[str]:
        """A text in parts that a slow tokenizer reads without special tokens: whole, or cut inside what would be one."""
        if not text:
            return []
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for i in ids:
            word = self.special.get(i, "")
            if i != self.tokenizer.unk_token_id and len(word) > 1 and (at := text.find(word)) >= 0:
                return [*self._broken(text[: at + 1]), *self._broken(text[at + 1 :])]
        return [text]

    def _template_tokens(self, text: str, rows: Spans) -> Iterator[tuple[int, int, int]]:
        """(begin, end, id) of the special tokens in the parts of a text that are not of rows."""
        for begin, end in between(rows, len(text)):
            literal = text[begin:end]
            if self._overlooked is not None:
                ids = {word: i for i, word in self.special.items()}
                found = self._overlooked.finditer(literal)
                yield from ((begin + one.start(), begin + one.end(), ids[one.group()]) for one in found)
                continue
            if self._backend is not None:
                encoding = self._native([literal]).encodings[0]
                yield from ((begin + a, begin + b, i) for _, (a, b), i in self._occurrences(literal, encoding.ids, encoding))
                continue
            at = 0
            for i in self.tokenizer(literal, add_special_tokens=False)["input_ids"]:
                if i in self.special and (there := literal.find(self.special[i], at)) >= 0:
                    at = there + len(self.special[i])
                    yield begin + there, begin + at, i


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text (a beginning token, or nothing)."""
    marked = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    places = (i for i in range(len(marked)) if marked[i : i + len(bare)] == bare)
    return marked[: next(places, 0)]
