"""Tokens as text in pieces: nothing is lost, and learnt text and special tokens are told apart."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.data.text_encoder import TextEncoder
from flora_train.data.token_text import Piece, token_pieces
from tests.unit.data.many_tokenizers import KINDS, smollm2

TEXT = st.text(st.sampled_from("ab the\n\té€😀日 <|>x.,'"), min_size=1, max_size=20)
WHOLE = [kind for kind in KINDS if kind not in ("words", "word-pieces", "spaced-pieces")]
"""Tokenizers that write text as it was, except for characters that they do not know."""


@cache
def tokenizer(kind: str) -> Any:
    return KINDS[kind]()


def pieces_of(tokenizer: Any, ids: list[int], *spans: tuple[int, int]) -> list[Piece]:
    learnt = np.array(spans, dtype=np.int32).reshape(-1, 2)
    return token_pieces(tokenizer, np.array(ids, dtype=np.int32), learnt)


@pytest.mark.parametrize("kind", WHOLE)
@given(text=TEXT, data=st.data())
def test_pieces_are_the_whole_text_wherever_a_span_begins(kind: str, text: str, data: st.DataObject) -> None:
    encoder = TextEncoder(tokenizer(kind))
    (encoded,) = encoder.encode([(text, [(0, len(text))])])
    ids = encoded.ids.tolist()
    begin = data.draw(st.integers(0, len(ids)))
    end = data.draw(st.integers(begin, len(ids)))
    pieces = pieces_of(tokenizer(kind), ids, (begin, end))
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    whole = tokenizer(kind).decode(ids, **options)
    if any(piece.special for piece in pieces):  # an unknown character
        return
    joined = "".join(piece.text for piece in pieces)
    if "\ufffd" not in joined:  # a span that begins within a character
        assert joined == whole
    assert sum(piece.learnt for piece in pieces) <= 1
    if begin < end:
        (learnt,) = (piece for piece in pieces if piece.learnt)
        assert learnt.text in whole or "\ufffd" in learnt.text


def test_special_tokens_are_pieces_and_their_text_in_rows_is_not() -> None:
    base = smollm2()
    encoder = TextEncoder(base)
    turn = "<|im_start|>user\nwrite <|im_end|><|im_end|>\n"
    (encoded,) = encoder.encode([(turn, [(17, 33)])])
    begin = len(encoded.ids) - 2
    pieces = pieces_of(base, encoded.ids.tolist(), (begin, begin + 1))
    assert pieces == [
        Piece("<|im_start|>", False, True),
        Piece("user\nwrite <|im_end|>", False, False),
        Piece("<|im_end|>", True, True),
        Piece("\n", False, False),
    ]


def test_pieces_from_the_completion_on_continue_the_prompt() -> None:
    llama = tokenizer("legacy-llama")
    ids = (
        llama("ab", add_special_tokens=False)["input_ids"]
        + llama("a b", add_special_tokens=False)["input_ids"]
    )
    begin = len(llama("ab", add_special_tokens=False)["input_ids"])
    learnt = np.array([(begin, len(ids))], dtype=np.int32)
    (piece,) = token_pieces(llama, np.array(ids, dtype=np.int32), learnt, first=begin)
    assert piece == Piece(" a b", True, False)


def test_no_tokens_have_no_pieces() -> None:
    assert pieces_of(smollm2(), []) == []
