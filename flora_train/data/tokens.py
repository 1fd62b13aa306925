"""What do a task's examples look like to the model, and which were left out?"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import fail
from flora_train.data.examples import TextExample


@dataclass(frozen=True)
class SplitCounts:
    """What became of a split's rows: rows = used rows + empty + over_long_dropped + prompt_too_long + unsampled + unusable.

    Rows that went to the other split by validation_fraction count there.
    """

    rows: int = 0
    unsampled: int = 0
    """Left out by max_examples."""
    empty: int = 0
    """No text to learn."""
    over_long_truncated: int = 0
    over_long_split: int = 0
    over_long_dropped: int = 0
    prompt_too_long: int = 0
    """The prompt alone fills max_length, so nothing would be learnt."""
    pieces: int = 0
    """Pieces of text that are learnt: more than rows used where long ones were split, as many as examples without packing."""
    examples: int = 0
    """Sequences made of them: fewer than pieces where several are packed into one."""
    tokens: int = 0
    label_tokens: int = 0
    unusable: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Speech: reason -> the clips that were left out for it."""
    seconds: float = 0.0
    """Speech: of all clips used."""


@dataclass(frozen=True)
class TokenSplit:
    """Tokenised pieces of text, one after the other, and the examples that they make up.

    tokens: int32 [sum of lengths]; offsets: int64 [m + 1], where pieces begin; prompt_lengths: int32 [m], tokens that are
    read but not learnt; label_bytes: int64 [m], UTF-8 bytes of the learnt text (for bits per byte; the end token has none);
    packs: int64 [n + 1], example i is the pieces packs[i]:packs[i + 1], which must not see each other.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    label_bytes: NDArray[np.int64]
    packs: NDArray[np.int64]
    counts: SplitCounts

    def __len__(self) -> int:
        return len(self.packs) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example."""
        return np.diff(self.offsets[self.packs])

    @property
    def label_counts(self) -> NDArray[np.int64]:
        """Learnt tokens per example. A piece's first token has nothing before it to be predicted from."""
        return self._per_example(np.diff(self.offsets) - np.maximum(self.prompt_lengths, 1))

    @property
    def example_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of learnt text per example."""
        return self._per_example(self.label_bytes)

    @property
    def is_packed(self) -> bool:
        """Whether some example has several pieces."""
        return len(self) < len(self.prompt_lengths)

    def window(self, index: int) -> int:
        """Encoder positions of an example: text has none."""
        return 0

    def example(self, index: int) -> NDArray[np.int32]:
        """Its tokens."""
        return self.tokens[self.offsets[self.packs[index]] : self.offsets[self.packs[index + 1]]]

    def pieces(self, index: int) -> list[tuple[NDArray[np.int32], int]]:
        """The pieces of an example: tokens, and how many of them are read only."""
        pieces = range(self.packs[index], self.packs[index + 1])
        return [(self.tokens[self.offsets[i] : self.offsets[i + 1]], int(self.prompt_lengths[i])) for i in pieces]

    def _per_example(self, per_piece: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.diff(np.concatenate([[0], per_piece.cumsum()])[self.packs])

    def save(self, path: Path) -> None:
        """Atomically, so that a cache file is whole or absent, whichever processes write it. Raises OSError."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "counts"}
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays, counts=np.array(json.dumps(asdict(self.counts))))
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path) as content:
            counts = SplitCounts(**json.loads(str(content["counts"])))
            arrays = {f.name: content[f.name] for f in fields(cls) if f.name != "counts"}
        return cls(**arrays, counts=counts)


def tokenise(examples: list[TextExample], tokenizer: Any, max_length: int, over_long: str, unsampled: int = 0) -> TokenSplit:
    """Token ids of prompt + completion + end token for each example, none dropped without being counted.

    Prompt and completion are tokenised apart, so that training sees a prompt as generation will. The end token is
    left out where an example was cut.
    """
    kept = [example for example in examples if example.completion.strip()]
    start = start_tokens(tokenizer)
    pieces: list[NDArray[np.int32]] = []
    prompt_lengths: list[int] = []
    label_bytes: list[int] = []
    tally = Counter(empty=len(examples) - len(kept))
    for prompt, completion, bytes_before in _encode(tokenizer, kept):
        if not completion:  # the tokenizer knows none of its characters
            tally["empty"] += 1
            continue
        head = start + prompt
        whole = [*completion, tokenizer.eos_token_id]
        fate, spans = _cut(len(whole), max_length - len(head), "truncate" if over_long == "split" and prompt else over_long)
        tally[fate] += 1
        for begin, end in spans:
            pieces.append(np.array(head + whole[begin:end], dtype=np.int32))
            prompt_lengths.append(len(head))
            first_learnt = begin if head else begin + 1  # nothing predicts the first token of all
            label_bytes.append(bytes_before(end) - bytes_before(first_learnt))
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    prompt_array = np.array(prompt_lengths, dtype=np.int32)
    counts = SplitCounts(
        rows=len(examples) + unsampled,
        unsampled=unsampled,
        empty=tally["empty"],
        over_long_truncated=tally["truncate"],
        over_long_split=tally["split"],
        over_long_dropped=tally["drop"],
        prompt_too_long=tally["prompt_too_long"],
        pieces=len(pieces),
        examples=len(pieces),
        tokens=int(lengths.sum()),
        label_tokens=int((lengths - np.maximum(prompt_array, 1)).sum()),
    )
    return TokenSplit(
        tokens=np.concatenate([np.empty(0, dtype=np.int32), *pieces]),
        offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        prompt_lengths=prompt_array,
        label_bytes=np.array(label_bytes, dtype=np.int64),
        packs=np.arange(len(pieces) + 1, dtype=np.int64),
        counts=counts,
    )


def check_tokenizer(tokenizer: Any, model_path: str) -> None:
    """Training needs an end token and something to pad with. Raises UserError if the tokenizer lacks one."""
    if tokenizer.eos_token_id is None:
        fix = "its tokenizer has no end-of-sequence token: set tokenizer.eos_token and save it there"
        raise fail("model.path", model_path, fix)
    if tokenizer.pad_token_id is None:
        fix = "its tokenizer has no padding token: set tokenizer.pad_token (often to eos_token) and save it there"
        raise fail("model.path", model_path, fix)


def pad_token(tokenizer: Any) -> int:
    """What fills a row up; never learnt, because labels go by position."""
    return int(tokenizer.pad_token_id)


def _cut(length: int, room: int, over_long: str) -> tuple[str, list[tuple[int, int]]]:
    """What becomes of `length` tokens where there is room for `room`, and the spans of them that are used."""
    if length <= room:
        return "whole", [(0, length)]
    if room < 1:
        return "prompt_too_long", []
    if over_long == "truncate":
        return "truncate", [(0, room)]
    if over_long == "drop":
        return "drop", []
    parts = -(-length // room)
    # equal parts: a short rest would be learnt almost without context
    return "split", [(length * i // parts, length * (i + 1) // parts) for i in range(parts)]


def _encode(tokenizer: Any, examples: list[TextExample]) -> Iterator[tuple[list[int], list[int], Callable[[int], int]]]:
    """(prompt ids, completion ids, number of completion tokens -> UTF-8 bytes of the text they cover) of each example."""
    for begin in range(0, len(examples), ENCODE_AT_ONCE):  # tokenizers keep offsets in memory, too
        chunk = examples[begin : begin + ENCODE_AT_ONCE]
        prompts = _ids(tokenizer, [example.prompt for example in chunk])["input_ids"]
        completions = _ids(tokenizer, [example.completion for example in chunk])
        for i, example in enumerate(chunk):
            ids = completions["input_ids"][i]
            encoding = completions.encodings[i] if completions.encodings else None
            yield prompts[i], ids, _byte_counter(tokenizer, example.completion, ids, encoding)


ENCODE_AT_ONCE = 1024
"""Examples that are tokenised in one call."""


def _ids(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)


def _byte_counter(tokenizer: Any, text: str, ids: list[int], encoding: Any) -> Callable[[int], int]:
    """How many UTF-8 bytes of `text` do its first n tokens cover? A character that tokens share counts with the first."""

    def bytes_before(n: int) -> int:
        if n >= len(ids):  # the end token stands for no text
            return len(text.encode())
        if n == 0:
            return 0
        if encoding is not None:
            return len(text[: encoding.token_to_chars(n - 1)[1]].encode())
        return len(tokenizer.decode(ids[:n]).rstrip("\ufffd").encode())  # a slow tokenizer has no offsets

    return bytes_before


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text (a beginning token, or nothing)."""
    marked = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    places = (i for i in range(len(marked)) if marked[i : i + len(bare)] == bare)
    return marked[: next(places, 0)]


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over the fast tokenizer's whole definition, or over the vocabulary of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((content + str(tokenizer.eos_token_id)).encode()).hexdigest()
