"""The text of tokens in pieces: learnt or only read, special tokens apart from text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.data.tokenizer_copies import special_tokens_of


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sort, as text."""

    text: str
    learnt: bool
    special: bool
    """Whether this is one special token, rather than text."""


def token_pieces(
    tokenizer: Any, tokens: NDArray[np.int32], spans: NDArray[np.int32], first: int = 0
) -> list[Piece]:
    """The pieces of a document.

    spans: int32 [s, 2], begin and end of its learnt tokens. first: the token that the first piece begins
    with, at which a span begins.
    """
    special = special_tokens_of(tokenizer)
    learnt = np.zeros(len(tokens), dtype=np.bool_)
    for begin, end in spans.tolist():
        learnt[begin:end] = True
    bounds = _boundaries(tokens.tolist(), learnt, special)
    pieces: list[Piece] = []
    before = 0
    for begin, end in pairwise(bounds):
        text = special.get(int(tokens[begin]))
        is_special = text is not None
        text = text or _text(tokenizer, tokens, before, begin, end=end)
        if begin >= first:
            pieces.append(Piece(text, bool(learnt[begin]), is_special))
        before = begin
    return pieces


def _boundaries(tokens: list[int], learnt: NDArray[np.bool_], special: dict[int, str]) -> list[int]:
    """Where pieces begin, and the end of the last one."""
    bounds = [0] if tokens else []
    for i in range(1, len(tokens)):
        if learnt[i] != learnt[i - 1] or tokens[i] in special or tokens[i - 1] in special:
            bounds.append(i)
    return [*bounds, len(tokens)]


def _text(tokenizer: Any, tokens: NDArray[np.int32], before: int, begin: int, *, end: int) -> str:
    """The text of the tokens begin:end, as they continue those from `before` on: tokenizers drop the first
    space of what they take for a whole text."""
    context, both = _decode(tokenizer, tokens[before:begin]), _decode(tokenizer, tokens[before:end])
    if both.startswith(context):
        return both[len(context) :]
    return _decode(tokenizer, tokens[begin:end])


def _decode(tokenizer: Any, tokens: NDArray[np.int32]) -> str:
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(tokens.tolist(), **options))
