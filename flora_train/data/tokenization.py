"""What do a task's examples look like to the model, and which were left out?"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import user_error
from flora_train.data.templates import PromptCompletion
from flora_train.data.text_encoder import TextEncoder, start_tokens
from flora_train.data.token_cache import Encoded


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
    documents: int = 0
    """Pieces of text that are learnt: more than the rows used where long ones are split."""
    examples: int = 0
    """Sequences made of the documents: fewer than documents where several are packed into one."""
    tokens: int = 0
    label_tokens: int = 0
    unusable: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Speech: reason -> the clips that were left out for it."""
    seconds: float = 0.0
    """Speech: of all clips used."""
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    """Special token -> how often it is written in rows: as text, unless the task says special_tokens: true."""


@dataclass(frozen=True)
class TokenSplit:
    """Tokenized documents, one after the other, and the examples that they make up.

    tokens: int32 [sum of lengths]; offsets: int64 [m + 1], where documents begin; prompt_lengths: int32 [m], tokens that are
    read but not learnt; label_bytes: int64 [m], UTF-8 bytes of the learnt text (for bits per byte; the end token has none);
    pack_offsets: int64 [n + 1], example i holds the documents pack_offsets[i]:pack_offsets[i + 1], which do not attend to each other.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    label_bytes: NDArray[np.int64]
    pack_offsets: NDArray[np.int64]
    counts: SplitCounts

    def __len__(self) -> int:
        return len(self.pack_offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example."""
        return np.diff(self.offsets[self.pack_offsets])

    @property
    def label_counts(self) -> NDArray[np.int64]:
        """Learnt tokens per example. The first token of a document is not predicted."""
        return self._per_example(np.diff(self.offsets) - np.maximum(self.prompt_lengths, 1))

    @property
    def example_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of learnt text per example."""
        return self._per_example(self.label_bytes)

    @property
    def is_packed(self) -> bool:
        """Whether some example has several documents."""
        return len(self) < len(self.prompt_lengths)

    def window(self, index: int) -> int:
        """Encoder positions of an example: text has none."""
        return 0

    def example(self, index: int) -> NDArray[np.int32]:
        """Its tokens."""
        return self.tokens[self.offsets[self.pack_offsets[index]] : self.offsets[self.pack_offsets[index + 1]]]

    def documents(self, index: int) -> list[tuple[NDArray[np.int32], int]]:
        """The documents of an example: tokens, and the length of the prompt among them."""
        documents = range(self.pack_offsets[index], self.pack_offsets[index + 1])
        return [(self.tokens[self.offsets[i] : self.offsets[i + 1]], int(self.prompt_lengths[i])) for i in documents]

    def _per_example(self, per_document: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.diff(np.concatenate([[0], per_document.cumsum()])[self.pack_offsets])

    def save(self, path: Path) -> None:
        """Atomically, so that a cache file is whole or absent, whichever processes write it. Raises OSError."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "counts"}
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays, counts=np.array(json.dumps(asdict(self.counts))))
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path) as content:
            counts = SplitCounts(**json.loads(str(content["counts"])))
            arrays = {f.name: content[f.name] for f in fields(cls) if f.name != "counts"}
        return cls(**arrays, counts=counts)


def tokenise(
    examples: list[PromptCompletion],
    tokenizer: Any,
    max_length: int,
    truncation: str,
    unsampled: int = 0,
    special_tokens: bool = False,
) -> TokenSplit:
    """Token ids of prompt + completion + end token for each example, none dropped without being counted.

    Prompt and completion are tokenised apart, so that training sees a prompt as generation will; the completion as text that
    goes on. Start and end token stand once, also where the text has them itself. The end token is left out where an example was
    cut. special_tokens: special tokens that are written in rows are tokens; else they are text.
    """
    kept = [example for example in examples if not example.is_empty]
    encoder = TextEncoder(tokenizer, special_tokens)
    documents: list[NDArray[np.int32]] = []
    prompt_lengths: list[int] = []
    label_bytes: list[int] = []
    tally, written = Counter(empty=len(examples) - len(kept)), Counter[str]()
    for prompt, completion in _encode(encoder, kept, max_length, truncation):
        written += prompt.written + completion.written
        if not len(completion.ids):  # the tokenizer knows none of its characters
            tally["empty"] += 1
            continue
        head, begins = _head(encoder, prompt.ids, completion.ids)
        ends_itself = own_end(tokenizer, completion)
        whole = completion.ids[begins:] if ends_itself is not None else np.append(completion.ids[begins:], tokenizer.eos_token_id)
        fate, spans = _cut(
            len(whole), max_length - len(head), "truncate" if truncation == "split" and len(prompt.ids) else truncation
        )
        tally[fate] += 1
        for begin, after in spans:
            documents.append(np.concatenate([head, whole[begin:after]]).astype(np.int32))
            prompt_lengths.append(len(head))
            first_learnt = begin if len(head) else begin + 1  # nothing predicts the first token of all
            before = completion.bytes_before(begins + first_learnt)  # first the smaller: counting goes on from there
            covered = completion.bytes_before(begins + after) - before
            if ends_itself is not None and begins + first_learnt <= ends_itself < begins + after:
                covered -= completion.bytes_before(ends_itself + 1) - completion.bytes_before(ends_itself)
            label_bytes.append(covered)  # the end token stands for no text
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    prompt_array = np.array(prompt_lengths, dtype=np.int32)
    counts = SplitCounts(
        rows=len(examples) + unsampled,
        unsampled=unsampled,
        empty=tally["empty"],
        over_long_truncated=tally["truncate"],
        over_long_split=tally["split"],
        over_long_dropped=tally["drop"],
        prompt_too_long=tally["prompt_too_long"],
        documents=len(documents),
        examples=len(documents),
        tokens=int(lengths.sum()),
        label_tokens=int((lengths - np.maximum(prompt_array, 1)).sum()),
        special_tokens=dict(written),
    )
    return TokenSplit(
        tokens=np.concatenate([np.empty(0, dtype=np.int32), *documents]),
        offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        prompt_lengths=prompt_array,
        label_bytes=np.array(label_bytes, dtype=np.int64),
        pack_offsets=np.arange(len(documents) + 1, dtype=np.int64),
        counts=counts,
    )


def _head(encoder: TextEncoder, prompt: NDArray[np.int32], completion: NDArray[np.int32]) -> tuple[list[int], int]:
    """The tokens that are read only, and how many of the completion's are among them: start tokens that it begins with."""
    start = encoder.start
    if not len(prompt) and start and completion[: len(start)].tolist() == start and len(completion) > len(start):
        return start, len(start)
    return encoder.with_start(prompt.tolist()), 0


def own_end(tokenizer: Any, completion: Encoded) -> int | None:
    """Where the end token stands that a text ends with itself, perhaps before white space; None: it has none."""
    ids = completion.ids if completion.whole else completion.ids[:0]
    for at in range(len(ids) - 1, max(-1, len(ids) - 1 - LAST), -1):
        if ids[at] == tokenizer.eos_token_id:
            return at
        if tokenizer.decode([int(ids[at])]).strip():
            break
    return None


LAST = 8
"""Tokens at the end of a text among which its end token is looked for."""


def check_tokenizer(tokenizer: Any, model_path: str) -> None:
    """Training needs an end token. Raises UserError if the tokenizer lacks one."""
    if tokenizer.eos_token_id is None:
        hint = "its tokenizer has no end-of-sequence token: set tokenizer.eos_token and save it there"
        raise user_error("model.path", model_path, hint)


def pad_token(tokenizer: Any) -> int:
    """What fills a row up: the padding token, or the end token where a tokenizer has none. Padding is never learnt, because labels
    and masks go by lengths; the end token of a text is."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _cut(length: int, room: int, truncation: str) -> tuple[str, list[tuple[int, int]]]:
    """What becomes of `length` tokens where there is room for `room`, and the spans of them that are used."""
    if length <= room:
        return "whole", [(0, length)]
    if room < 1:
        return "prompt_too_long", []
    if truncation == "truncate":
        return "truncate", [(0, room)]
    if truncation == "drop":
        return "drop", []
    parts = -(-length // room)
    # equal parts: a short rest would be learnt almost without context
    return "split", [(length * i // parts, length * (i + 1) // parts) for i in range(parts)]


def _encode(
    encoder: TextEncoder, examples: Sequence[PromptCompletion], max_length: int, truncation: str
) -> Iterator[tuple[Encoded, Encoded]]:
    """(prompt, completion) of each example; where only their first tokens are used, no more than are needed."""
    for chunk in _chunks(examples):
        prompts = encoder.encode([(e.prompt, e.prompt_rows) for e in chunk], more=True, limit=max_length)
        # what stands before a completion, and whether all of it can be used
        kinds = [
            (encoder.place_after(prompt.ids, e.prompt), truncation == "split" and not len(prompt.ids))
            for e, prompt in zip(chunk, prompts, strict=True)
        ]
        found: dict[int, Encoded] = {}
        for kind in dict.fromkeys(kinds):
            place, all_is_used = kind
            mine = [i for i, other in enumerate(kinds) if other == kind]
            texts = [encoder.after(prompts[i].ids, chunk[i].completion, chunk[i].completion_rows) for i in mine]
            found |= zip(mine, encoder.encode(texts, place, limit=None if all_is_used else max_length), strict=True)
        yield from ((prompt, found[i]) for i, prompt in enumerate(prompts))


def _chunks(examples: Sequence[PromptCompletion]) -> Iterator[list[PromptCompletion]]:
    """Examples that are tokenised in one call: tokenizers keep offsets of all of them in memory."""
    chunk: list[PromptCompletion] = []
    size = 0
    for example in examples:
        more = len(example.prompt) + len(example.completion)
        if chunk and (len(chunk) == ENCODE_AT_ONCE or size + more > CHARACTERS_AT_ONCE):
            yield chunk
            chunk, size = [], 0
        chunk.append(example)
        size += more
    if chunk:
        yield chunk


ENCODE_AT_ONCE, CHARACTERS_AT_ONCE = 1024, 1 << 22


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over all of a tokenizer that tokens depend on: the fast tokenizer's whole definition, or the vocabulary of a slow one;
    special tokens; what it puts before a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    added = sorted((int(i), repr(token)) for i, token in tokenizer.added_tokens_decoder.items())
    rest = [added, start_tokens(tokenizer), tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256((content + json.dumps(rest)).encode()).hexdigest()
