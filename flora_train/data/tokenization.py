"""Tokenizes prompts and completions, with start and end tokens, cut to a maximum length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import user_error
from flora_train.data.documents import EncodedDocument, EncodedExample, Fate
from flora_train.data.split_builder import SplitBuilder
from flora_train.data.templates import PromptCompletion
from flora_train.data.text_encoder import TextEncoder, start_tokens
from flora_train.data.token_cache import Encoded
from flora_train.data.token_split import TokenSplit
from flora_train.data.tokenizer_copies import Place

CHUNK_EXAMPLES, CHUNK_CHARACTERS = 1024, 1 << 22
"""Examples and characters that are tokenized in one call: tokenizers keep the offsets of all of them in
memory."""
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
) -> TokenSplit:
    """The split of `examples`, tokenized as `ExampleTokenizer` does. Examples that are left out are counted.

    unsampled: rows that were left out before, for the counts; special_tokens: special tokens that are written
    in rows are tokens, not text.
    """
    encode = ExampleTokenizer(
        tokenizer, max_length=max_length, truncation=truncation, special_tokens=special_tokens
    )
    builder = SplitBuilder()
    for example in encode(examples):
        builder.add(example)
    return builder.split(unsampled=unsampled)


class ExampleTokenizer:
    """Makes the token ids of prompt + completion + end token of examples.

    Prompt and completion are tokenized separately, so that training reads a prompt as generation does, and
    the completion as text that continues it. Start and end tokens occur once, even if the text contains them.
    A truncated example has no end token.
    """

    def __init__(
        self, tokenizer: Any, *, max_length: int, truncation: str, special_tokens: bool = False
    ) -> None:
        self.tokenizer, self.encoder = tokenizer, TextEncoder(tokenizer, special_tokens)
        self.max_length, self.truncation = max_length, truncation

    def __call__(self, examples: Sequence[PromptCompletion]) -> Iterator[EncodedExample]:
        """One encoded example for each of `examples`, in their order."""
        with_text = [example for example in examples if not example.is_empty]
        encoded = _encode(self.encoder, with_text, self.max_length, truncation=self.truncation)
        for example in examples:
            if example.is_empty:
                yield EncodedExample((), "empty")
            else:
                yield self._documents(*next(encoded))

    def _documents(self, prompt: Encoded, completion: Encoded) -> EncodedExample:
        written = prompt.written + completion.written
        if not len(completion.ids):  # the tokenizer has none of its characters
            return EncodedExample((), "empty", written)
        head, begins = _head(self.encoder, prompt.ids, completion.ids)
        end_token = own_end(self.tokenizer, completion)
        ids = completion.ids[begins:]
        if end_token is None:
            ids = np.append(ids, self.tokenizer.eos_token_id)
        truncation = self.truncation
        if truncation == "split" and len(prompt.ids):
            truncation = "truncate"
        fate, parts = cut(len(ids), self.max_length - len(head), truncation)
        documents = []
        for begin, end in parts:
            tokens = np.concatenate([head, ids[begin:end]]).astype(np.int32)
            first_learnt = begin
            if not head:  # nothing precedes the first token, so that it is not predicted
                first_learnt += 1
            label_bytes = _bytes_between(completion, begins + first_learnt, begins + end, end_token=end_token)
            documents.append(EncodedDocument(tokens, [(len(head), len(tokens))], label_bytes))
        return EncodedExample(tuple(documents), fate, written)


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
    """The padding token, or the end token if a tokenizer has none, or the first one if it has neither.

    Labels and masks depend on lengths, so that padding is never learnt while the end token of a text is.
    """
    if tokenizer.pad_token_id is None:
        return int(tokenizer.eos_token_id or 0)
    return int(tokenizer.pad_token_id)


def cut(length: int, room: int, truncation: str) -> tuple[Fate, list[tuple[int, int]]]:
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
