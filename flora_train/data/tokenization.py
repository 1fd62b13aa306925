"""Tokenizes examples: prompt and completion with start and end tokens, cut to a maximum length."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import user_error
from flora_train.data.templates import PromptCompletion
from flora_train.data.text_encoder import TextEncoder, start_tokens
from flora_train.data.token_cache import Encoded
from flora_train.data.token_split import SplitCounts, TokenSplit
from flora_train.data.tokenizer_copies import Place
from flora_train.runtime.progress import ProgressBar

CHUNK_EXAMPLES, CHUNK_CHARACTERS = 1024, 1 << 22
"""Examples and characters that are tokenized in one call: tokenizers keep the offsets of all of them in
memory."""
PROGRESS_CHARACTERS = 1 << 23
"""Characters of a split from which on its progress is shown."""
LAST_TOKENS = 8
"""Tokens at the end of a text among which its own end token is searched."""


def tokenize(
    examples: Sequence[PromptCompletion],
    tokenizer: Any,
    max_length: int,
    *,
    truncation: str,
    unsampled: int = 0,
    special_tokens: bool = False,
    name: str = "",
) -> TokenSplit:
    """Token ids of prompt + completion + end token for each example. Examples that are left out are counted.

    Prompt and completion are tokenized separately, so that training reads a prompt as generation does, and
    the completion as text that continues it. Start and end tokens occur once, even if the text contains them.
    A truncated example has no end token.

    unsampled: rows that were left out before, for the counts; special_tokens: special tokens that are written
    in rows are tokens, not text; name: of the split, for the progress bar of a large one.
    """
    used = [example for example in examples if not example.is_empty]
    encoder = TextEncoder(tokenizer, special_tokens)
    documents = _Documents(tokenizer, encoder, max_length, truncation)
    documents.fates["empty"] = len(examples) - len(used)
    characters = [len(example.prompt) + len(example.completion) for example in used]
    encoded = _encode(encoder, used, max_length, truncation=truncation)
    if name and sum(characters) >= PROGRESS_CHARACTERS:
        encoded = _with_progress(encoded, characters, name)
    for prompt, completion in encoded:
        documents.add(prompt, completion)
    return documents.split(rows=len(examples) + unsampled, unsampled=unsampled)


def _with_progress(
    encoded: Iterator[tuple[Encoded, Encoded]], characters: Sequence[int], name: str
) -> Iterator[tuple[Encoded, Encoded]]:
    """The same, with a progress bar over the characters that are tokenized."""
    done = 0
    with ProgressBar(f"tokenize {name}", sum(characters)) as progress:
        for size, example in zip(characters, encoded, strict=True):
            done += size
            progress.update(done)
            yield example


class _Documents:
    """Documents of a split, added example by example."""

    def __init__(self, tokenizer: Any, encoder: TextEncoder, max_length: int, truncation: str) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        self.max_length, self.truncation = max_length, truncation
        self.tokens: list[NDArray[np.int32]] = []
        self.prompt_lengths: list[int] = []
        self.label_bytes: list[int] = []
        self.fates = Counter[str]()
        self.written = Counter[str]()

    def add(self, prompt: Encoded, completion: Encoded) -> None:
        """Append the documents of one example."""
        self.written += prompt.written + completion.written
        if not len(completion.ids):  # the tokenizer has none of its characters
            self.fates["empty"] += 1
            return
        head, begins = _head(self.encoder, prompt.ids, completion.ids)
        end_token = own_end(self.tokenizer, completion)
        ids = completion.ids[begins:]
        if end_token is None:
            ids = np.append(ids, self.tokenizer.eos_token_id)
        truncation = self.truncation
        if truncation == "split" and len(prompt.ids):
            truncation = "truncate"
        fate, spans = _cut(len(ids), self.max_length - len(head), truncation)
        self.fates[fate] += 1
        for begin, end in spans:
            self.tokens.append(np.concatenate([head, ids[begin:end]]).astype(np.int32))
            self.prompt_lengths.append(len(head))
            first_learnt = begin
            if not head:  # nothing precedes the first token, so that it is not predicted
                first_learnt += 1
            self.label_bytes.append(
                _bytes_between(completion, begins + first_learnt, begins + end, end_token=end_token)
            )

    def split(self, *, rows: int, unsampled: int) -> TokenSplit:
        """All documents, each an example of its own."""
        lengths = np.array([len(document) for document in self.tokens], dtype=np.int64)
        prompt_lengths = np.array(self.prompt_lengths, dtype=np.int32)
        counts = SplitCounts(
            rows=rows,
            unsampled=unsampled,
            empty=self.fates["empty"],
            over_long_truncated=self.fates["truncate"],
            over_long_split=self.fates["split"],
            over_long_dropped=self.fates["drop"],
            prompt_too_long=self.fates["prompt_too_long"],
            documents=len(lengths),
            examples=len(lengths),
            tokens=int(lengths.sum()),
            label_tokens=int((lengths - np.maximum(prompt_lengths, 1)).sum()),
            special_tokens=dict(self.written),
        )
        return TokenSplit(
            tokens=np.concatenate([np.empty(0, dtype=np.int32), *self.tokens]),
            offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
            prompt_lengths=prompt_lengths,
            label_bytes=np.array(self.label_bytes, dtype=np.int64),
            pack_offsets=np.arange(len(lengths) + 1, dtype=np.int64),
            counts=counts,
        )


def _bytes_between(completion: Encoded, begin: int, end: int, *, end_token: int | None) -> int:
    """UTF-8 bytes of text that the tokens begin:end cover, without those of its own end token."""
    before = completion.bytes_before(begin)  # ascending calls: counting continues from there
    covered = completion.bytes_before(end) - before
    if end_token is not None and begin <= end_token < end:
        covered -= completion.bytes_before(end_token + 1) - completion.bytes_before(end_token)
    return covered


def _head(
    encoder: TextEncoder, prompt: NDArray[np.int32], completion: NDArray[np.int32]
) -> tuple[list[int], int]:
    """The tokens that are not learnt, and how many of them the completion itself begins with (start
    tokens)."""
    start = encoder.start
    if (
        not len(prompt)
        and start
        and completion[: len(start)].tolist() == start
        and len(completion) > len(start)
    ):
        return start, len(start)
    return encoder.with_start(prompt.tolist()), 0


def own_end(tokenizer: Any, completion: Encoded) -> int | None:
    """Position of the end token with which a text itself ends, perhaps before white space; None if there is
    none."""
    ids = completion.ids if completion.whole else completion.ids[:0]
    for at in range(len(ids) - 1, max(-1, len(ids) - 1 - LAST_TOKENS), -1):
        if ids[at] == tokenizer.eos_token_id:
            return at
        if tokenizer.decode([int(ids[at])]).strip():
            break
    return None


def check_tokenizer(tokenizer: Any, model_path: str) -> None:
    """Raises UserError if the tokenizer has no end token, which training needs."""
    if tokenizer.eos_token_id is None:
        hint = "has a tokenizer without an end-of-sequence token: set tokenizer.eos_token and save it there"
        raise user_error("model.path", model_path, hint)


def pad_token(tokenizer: Any) -> int:
    """The padding token, or the end token if a tokenizer has none.

    Labels and masks depend on lengths, so that padding is never learnt while the end token of a text is.
    """
    if tokenizer.pad_token_id is None:
        return int(tokenizer.eos_token_id)
    return int(tokenizer.pad_token_id)


def _cut(length: int, room: int, truncation: str) -> tuple[str, list[tuple[int, int]]]:
    """The treatment of `length` tokens where `room` tokens fit, and the spans of them that are used."""
    if length <= room:
        return "whole", [(0, length)]
    if room < 1:
        return "prompt_too_long", []
    if truncation == "truncate":
        return "truncate", [(0, room)]
    if truncation == "drop":
        return "drop", []
    parts = -(-length // room)
    # equal parts, because a short remainder would be learnt almost without context
    return "split", [(length * i // parts, length * (i + 1) // parts) for i in range(parts)]


def _encode(
    encoder: TextEncoder, examples: Sequence[PromptCompletion], max_length: int, *, truncation: str
) -> Iterator[tuple[Encoded, Encoded]]:
    """(prompt, completion) of each example. If only the first tokens are used, not many more are made."""
    for chunk in _chunks(examples):
        prompts = encoder.encode([(e.prompt, e.prompt_rows) for e in chunk], more=True, limit=max_length)
        by_setting: dict[tuple[Place, int | None], list[int]] = {}
        for i, (example, prompt) in enumerate(zip(chunk, prompts, strict=True)):
            limit: int | None = max_length
            if truncation == "split" and not len(prompt.ids):
                limit = None
            by_setting.setdefault((encoder.place_after(prompt.ids, example.prompt), limit), []).append(i)
        completions: dict[int, Encoded] = {}
        for (place, limit), members in by_setting.items():
            texts = [
                encoder.after(prompts[i].ids, chunk[i].completion, chunk[i].completion_rows) for i in members
            ]
            completions |= zip(members, encoder.encode(texts, place, limit=limit), strict=True)
        for i, prompt in enumerate(prompts):
            yield prompt, completions[i]


def _chunks(examples: Sequence[PromptCompletion]) -> Iterator[list[PromptCompletion]]:
    """Examples that are tokenized in one call."""
    chunk: list[PromptCompletion] = []
    size = 0
    for example in examples:
        added = len(example.prompt) + len(example.completion)
        if chunk and (len(chunk) == CHUNK_EXAMPLES or size + added > CHUNK_CHARACTERS):
            yield chunk
            chunk, size = [], 0
        chunk.append(example)
        size += added
    if chunk:
        yield chunk


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of everything that tokens depend on.

    This is the definition of a fast tokenizer, or the vocabulary of a slow one; its special tokens; and its
    start tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = sorted(tokenizer.get_vocab().items())
        content = json.dumps(vocabulary)
    else:
        content = backend.to_str()
    added = sorted((int(i), repr(token)) for i, token in tokenizer.added_tokens_decoder.items())
    rest = [added, start_tokens(tokenizer), tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256((content + json.dumps(rest)).encode()).hexdigest()
