"""What ends an assistant's turn: special tokens of the template, or what it writes before the next turn."""

from __future__ import annotations

import pytest

from flora_train.data.chat.encoder import ChatEncoder
from flora_train.data.chat.end_of_turn import end_of_turn
from flora_train.data.chat.template import ChatTemplate
from tests.unit.data.chat.chats import chat_encoder
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.data.many_tokenizers import smollm2

LOOP = "{% for message in messages %}BODY{% endfor %}{% if add_generation_prompt %}PROMPT{% endif %}"


def template(body: str, prompt: str) -> str:
    return LOOP.replace("BODY", body).replace("PROMPT", prompt)


HEADERS = template("{{ '<s>' + message.role + '\n\n' + message.content | trim + '<p>' }}", "<s>assistant\n\n")
"""Llama 3's form: another token than the end token ends a turn."""
NEWLINE = template("{{ '<s>' + message.role + '\n' + message.content + '<p>\n' }}", "<s>assistant\n")
"""Gemma's form: a line end after it."""
INSTRUCTIONS = template(
    "{% if message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
    "{% else %}### Response:\n{{ message.content }}\n\n{% endif %}",
    "### Response:\n",
)
"""Alpaca's form: no token ends a turn."""
BARE = template("{{ message.content + '\n' }}", "")
STRICT = "{{ raise_exception('no conversation') }}"


@pytest.mark.parametrize(
    ("source", "tokens", "stops"),
    [
        (HEADERS, ["<p>"], ()),
        (NEWLINE, ["<p>"], ()),
        (INSTRUCTIONS, [], ("\n\n### Instruction:",)),
        (BARE, [], ()),
        (STRICT, [], ()),
    ],
)
def test_a_template_without_marks(source: str, tokens: list[str], stops: tuple[str, ...]) -> None:
    base = byte_tokenizer()
    expected = frozenset(base.convert_tokens_to_ids(tokens))
    assert end_of_turn(chat_encoder(base, source)) == (expected, stops)


def test_a_template_with_marks() -> None:
    base = byte_tokenizer()
    assert end_of_turn(chat_encoder(base)) == (frozenset({base.eos_token_id}), ())


@pytest.mark.parametrize("name", [None, "chatml"])
def test_chatml_of_smollm2(name: str | None) -> None:
    base = smollm2()
    encoder = ChatEncoder(ChatTemplate.of(base, name, "tasks.talk"), base)
    assert end_of_turn(encoder) == (frozenset({base.convert_tokens_to_ids("<|im_end|>")}), ())


def test_a_token_that_the_tokenizer_lacks_is_a_string() -> None:
    base = byte_tokenizer()
    encoder = ChatEncoder(ChatTemplate.of(base, "chatml", "tasks.talk"), base)
    assert end_of_turn(encoder) == (frozenset({base.eos_token_id}), ("<|im_end|>",))
    plain = ChatEncoder(ChatTemplate.of(base, "plain", "tasks.talk"), base)
    assert end_of_turn(plain) == (frozenset({base.eos_token_id}), ())
