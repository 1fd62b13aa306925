"""Text that is shown while its tokens arrive: a prefix of the whole text, without parts of characters."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.data.text_encoder import TextEncoder
from flora_train.evaluation.generation.streaming import INCOMPLETE, TextStream
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.data.many_tokenizers import KINDS

TEXT = st.text(st.sampled_from("ab the\n\té€😀👩\u200d👦日本 <|>x.,'"), max_size=20)


@cache
def encoder(kind: str) -> TextEncoder:
    return TextEncoder(KINDS[kind]())


def stream(
    encoder: TextEncoder, prompt: list[int], tokens: list[int], stops: tuple[str, ...] = ()
) -> TextStream:
    """Reads the tokens one by one, and checks the text after each."""
    row = TextStream(encoder, prompt, stops)
    shown = ""
    for i in range(len(tokens)):
        shown += row.update(tokens[: i + 1])
        assert row.text == shown
        assert not shown.endswith(INCOMPLETE)
    return row


@pytest.mark.parametrize("kind", KINDS)
@given(before=TEXT, after=TEXT)
def test_streamed_text_is_the_whole_text(kind: str, before: str, after: str) -> None:
    prompt = encoder(kind).prompt(before, False)
    (encoded,) = encoder(kind).encode([(after, [(0, len(after))])], encoder(kind).place_after(prompt, before))
    tokens = encoded.ids.tolist()
    whole = encoder(kind).decode_after(prompt, tokens)
    row = stream(encoder(kind), prompt, tokens)
    shown = row.text
    assert whole.startswith(shown)
    assert shown + row.finish(whole) == whole
    assert row.text == whole


@pytest.mark.parametrize("kind", ["bytes", "prefixed-bytes", "smollm2"])
@given(data=st.data())
def test_any_tokens_are_streamed_to_their_whole_text(kind: str, data: st.DataObject) -> None:
    """Tokens as a model with random weights draws them: bytes that are no characters are among them."""
    size = min(len(encoder(kind).tokenizer), 400)
    tokens = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    prompt = encoder(kind).prompt("a", False)
    whole = encoder(kind).decode_after(prompt, tokens)
    row = stream(encoder(kind), prompt, tokens)
    shown = row.text
    assert whole.startswith(shown)
    assert whole.removeprefix(shown).strip(INCOMPLETE) == ""
    assert shown + row.finish(whole) == whole


@given(tokens=st.lists(st.integers(0, 350), max_size=20))
def test_bytes_that_later_ones_make_invalid_are_corrected_at_the_end(tokens: list[int]) -> None:
    """Llama 2's tokenizer decodes consecutive bytes as a whole, or none of them."""
    llama = encoder("legacy-llama")
    row = stream(llama, [], tokens)
    whole = llama.decode_after([], tokens)
    row.finish(whole)
    assert row.text == whole


def test_a_character_is_shown_once_its_last_byte_has_arrived() -> None:
    bytes_ = TextEncoder(byte_tokenizer())
    row = TextStream(bytes_, [])
    tokens = bytes_.prompt("a😀b", False)
    shown = [row.update(tokens[: i + 1]) for i in range(len(tokens))]
    assert shown == ["a", "", "", "", "😀", "b"]


def test_what_may_be_a_stop_string_is_shown_once_it_is_none() -> None:
    bytes_ = TextEncoder(byte_tokenizer())
    row = TextStream(bytes_, [], ("\nUser:", "##"))
    tokens = bytes_.prompt("a\nUse#\nUser: b", False)
    shown = [row.update(tokens[: i + 1]) for i in range(len(tokens))]
    assert shown[:6] == ["a", "", "", "", "", "\nUse"]
    assert row.text == "a\nUse#"
    assert row.finish("a\nUse#") == ""
