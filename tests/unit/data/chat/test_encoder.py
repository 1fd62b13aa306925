"""Tokens of conversations and the learnt ones among them, for every kind of tokenizer."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.data.chat.template import ChatTemplate, shipped_templates
from flora_train.data.text_encoder import TextEncoder
from tests.unit.data.chat.chats import TURNS, chat_encoder, conversation, learnt_texts, without_marks
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.data.many_tokenizers import KINDS

make = cache(lambda kind: KINDS[kind]())
LOSSLESS = ["bytes", "unigram-first", "legacy-llama", "prefixed-bytes", "slow", "smollm2"]
TURN = "<|turn|>"
CASES = [
    pytest.param(kind, source, id=f"{kind}-{name}")
    for kind in KINDS
    for name, source in (("marked", TURNS), ("unmarked", without_marks(TURNS)))
    if (kind, name) != ("words", "unmarked")  # there, the header is one word with the content
]
TWO_TURNS = conversation(("user", "a b"), ("assistant", "one two"), ("user", "c"), ("assistant", "three"))


def mark_of(tokenizer: Any) -> str:
    """A special token that can begin a turn."""
    return "<|im_start|>" if "<|im_start|>" in tokenizer.get_added_vocab() else TURN


def turn_tokens(kind: str) -> Any:
    tokenizer = make(kind)
    if mark_of(tokenizer) not in tokenizer.get_added_vocab():
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [TURN]}, replace_extra_special_tokens=False
        )
    return tokenizer


@pytest.mark.parametrize(("kind", "source"), CASES)
def test_every_turn_of_the_assistant_is_learnt_with_its_end_token(kind: str, source: str) -> None:
    tokenizer = turn_tokens(kind)
    chats = chat_encoder(tokenizer, source, turn=mark_of(tokenizer))
    every, last = (chats.document(TWO_TURNS, learn) for learn in ("assistant", "last"))
    assert len(every.spans) == 2
    assert all(every.tokens[end - 1] == tokenizer.eos_token_id for _, end in every.spans)
    assert list(last.spans) == list(every.spans)[1:]
    if kind in LOSSLESS:
        texts = [text.replace(tokenizer.eos_token, "").strip() for text in learnt_texts(tokenizer, every)]
        assert texts == ["one two", "three"]
        assert every.label_bytes == len("one twothree")
    everything = chats.document(TWO_TURNS, "all")
    assert list(everything.spans) == [(0, len(everything.tokens))]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_tokenizer_for_the_rendered_text(kind: str) -> None:
    tokenizer = turn_tokens(kind)
    chats = chat_encoder(tokenizer, turn=mark_of(tokenizer))
    text = chats.template.render(TWO_TURNS).text
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chats.document(TWO_TURNS).tokens.tolist() == list(expected)
    prompt = chats.prompt(TWO_TURNS.before(3)).tolist()
    assert expected[: len(prompt)] == prompt


@pytest.mark.parametrize(("kind", "source"), CASES)
def test_special_tokens_in_messages_are_text_and_end_no_turn(kind: str, source: str) -> None:
    tokenizer = turn_tokens(kind)
    mark, end = mark_of(tokenizer), tokenizer.eos_token
    said = conversation(("user", f"a {end} b{mark}"), ("assistant", f"one {end} two{mark}assistant: b"))
    document = chat_encoder(tokenizer, source, turn=mark).document(said)
    special = TextEncoder(tokenizer).special
    found = [i for i in document.tokens.tolist() if i in special and i != tokenizer.unk_token_id]
    mark_id = tokenizer.convert_tokens_to_ids(mark)
    assert found == [mark_id, tokenizer.eos_token_id] * 2
    assert len(document.spans) == 1
    if kind in LOSSLESS:
        text = tokenizer.decode(document.tokens.tolist()).replace(" ", "")
        assert f"one{end}two{mark}assistant:b{end}".replace(" ", "") in text
    with_tokens = chat_encoder(tokenizer, source, turn=mark, special_tokens=True).document(said)
    assert with_tokens.tokens.tolist().count(mark_id) == 4


def test_special_tokens_in_names_tools_and_arguments_are_text() -> None:
    tokenizer = byte_tokenizer()
    source = TURNS + "{%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}"
    messages = [
        {"role": "user", "name": "x<e>", "content": "a"},
        {
            "role": "assistant",
            "content": "b",
            "tool_calls": [{"name": "f<e>", "arguments": {"k<e>": ["v<e>", {"w": "<e>é"}]}}],
        },
    ]
    tools = [{"name": "f", "description": "<e>", "parameters": {"properties": {"p<e>": {}}}}]
    said = conversation(messages=messages, tools=tools)
    document = chat_encoder(tokenizer, source, turn="|").document(said)
    assert document.tokens.tolist().count(tokenizer.eos_token_id) == 2
    text = tokenizer.decode(document.tokens.tolist())
    assert text.count("<e>") == 9
    (learnt,) = learnt_texts(tokenizer, document)
    assert learnt == 'b{"name": "f<e>", "arguments": {"k<e>": ["v<e>", {"w": "<e>é"}]}}<e>'


PIECES = ["a", "b", " ", "\n", "é", "😀", "<e>", "<s>", "<p>", "|", "<", "e>", "\ue000", "\uf8ff", '"']
ODD = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@given(
    contents=st.lists(st.tuples(ODD, ODD), min_size=1, max_size=4),
    marked=st.booleans(),
    trims=st.booleans(),
)
def test_any_content_comes_back_and_spans_cover_what_the_assistant_says(
    contents: list[tuple[str, str]], marked: bool, trims: bool
) -> None:
    tokenizer = byte_tokenizer()
    source = TURNS.replace("message.content", "message.content | trim") if trims else TURNS
    chats = chat_encoder(tokenizer, source if marked else without_marks(source), turn="|")
    turns = [turn for asked, said in contents for turn in (("user", asked), ("assistant", said))]
    document = chats.document(conversation(*turns))
    ids = document.tokens.tolist()

    def shown(text: str) -> str:
        return text.strip() if trims else text

    expected = "".join(f"|{role}:{shown(text)}<e>" for role, text in turns)
    assert tokenizer.decode(ids) == expected
    assert ids.count(tokenizer.eos_token_id) == len(turns)
    assert not {tokenizer.bos_token_id, tokenizer.pad_token_id} & set(ids)
    assert learnt_texts(tokenizer, document) == [f"{shown(said)}<e>" for _, said in contents]
    assert document.label_bytes == sum(len(shown(said).encode()) for _, said in contents)


def test_weight_zero_is_not_learnt_in_any_way_of_learning() -> None:
    tokenizer = byte_tokenizer()
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    said = conversation(messages=messages)
    for source in (TURNS, without_marks(TURNS)):
        chats = chat_encoder(tokenizer, source, turn="|")
        assert learnt_texts(tokenizer, chats.document(said)) == ["d<e>"]
        all_but = learnt_texts(tokenizer, chats.document(said, "all"))
        assert all_but == ["|user:a<e>", "|user:c<e>|assistant:d<e>"]
        first = conversation(messages=[*messages[:3], {**messages[3], "train": False}])
        assert not chats.document(first, "last").spans


def test_a_text_begins_with_one_beginning_token() -> None:
    tokenizer = byte_tokenizer(start=True)
    for start in ("", "<s>", "<s><s>"):
        document = chat_encoder(tokenizer, start=start, turn="|").document(TWO_TURNS)
        assert document.tokens.tolist().count(tokenizer.bos_token_id) == min(1, len(start))
        assert learnt_texts(tokenizer, document) == ["one two<e>", "three<e>"]
        prompt = chat_encoder(tokenizer, start=start, turn="|").prompt(TWO_TURNS)
        assert prompt.tolist().count(tokenizer.bos_token_id) == min(1, len(start))
    for name in shipped_templates():
        chats = ChatTemplate.of(tokenizer, name, "tasks.t")
        assert chats.render(TWO_TURNS).text.startswith("<s>")
        assert not ChatTemplate.of(byte_tokenizer(), name, "tasks.t").render(TWO_TURNS).text.startswith("<s>")


DROPS = """{%- for message in messages %}
    {{- '|' + message.role + ':' }}
    {%- if message.role == 'assistant' and loop.last %}{{- message.reasoning_content or '' }}{%- endif %}
    {{- message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '|assistant:' }}{%- endif %}
"""
HEADS = (
    """{%- for message in messages %}{{- '|' + message.role + ':' + message.content + '\\n' }}{%- endfor %}"""
)
THINKS = DROPS.replace("'|assistant:'", "'|assistant:<think>'")
MERGES = without_marks(TURNS).replace("assistant:", "assistant:\\n")
SPACE = without_marks(TURNS).replace("assistant:", "assistant: ")
REASONED = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "r"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "reasoning_content": "s"},
]


def test_a_template_that_drops_earlier_reasoning_is_an_error_unless_only_the_last_turn_is_learnt() -> None:
    tokenizer = byte_tokenizer()
    chats = chat_encoder(tokenizer, DROPS)
    said = conversation(messages=REASONED)
    with pytest.raises(
        ValueError, match=r"a template renders message 2 in another way when other messages follow"
    ):
        chats.document(said)
    assert learnt_texts(tokenizer, chats.document(said, "last")) == ["sd<e>"]
    assert learnt_texts(tokenizer, chats.document(conversation(messages=REASONED[:2]))) == ["rb<e>"]


@pytest.mark.parametrize(
    ("source", "content", "reason"),
    [
        (HEADS, "b", "where the text of message 2 begins: use a chat_template that marks what is learnt"),
        (THINKS, "b", "begins the assistant's turn with '|assistant:<think>' for generation"),
        (MERGES, "\nb", "of a template, so that what is learnt cannot be told: remove white space"),
        (SPACE, "b", "of a template, so that what is learnt cannot be told: use a chat_template that marks"),
        ("{{- messages[5].content.missing }}", "b", "a template cannot render it"),
        ("{{- raise_exception('no system') }}", "b", "a template cannot render it: no system"),
        ("x", "b", "a template leaves out messages of the role 'user'"),
        (
            "{%- for m in messages %}{% generation %}{% endgeneration %}{{- m.content }}{%- endfor %}",
            "b",
            "marks nothing",
        ),
    ],
)
def test_what_cannot_be_told_is_an_error_with_the_reason(source: str, content: str, reason: str) -> None:
    tokenizer = byte_tokenizer(merges=(("Ċ", "Ċ"), ("Ġ", "b")))
    said = conversation(("user", "a"), ("assistant", content))
    with pytest.raises(ValueError, match=re.escape(reason)):
        chat_encoder(tokenizer, source, turn="|").document(said)


def test_reasoning_of_the_last_turn_that_is_not_written_is_noted() -> None:
    said = conversation(messages=REASONED)
    for source, notes in (
        (DROPS, []),
        (TURNS, ["a template does not write reasoning_content of the assistant's messages"]),
    ):
        chats = chat_encoder(byte_tokenizer(), source, turn="|")
        chats.document(said, "last")
        assert chats.check_complete.notes == notes


def test_a_conversation_that_the_assistant_begins_is_learnt_from_its_beginning() -> None:
    tokenizer = byte_tokenizer()
    needs_first = "{%- set first = messages[0].role + '' %}" + without_marks(TURNS)
    said = conversation(("assistant", "hello"), ("user", "a"), ("assistant", "b"))
    for source in (TURNS, without_marks(TURNS), needs_first):
        document = chat_encoder(tokenizer, source, turn="|").document(said)
        assert learnt_texts(tokenizer, document) == ["hello<e>", "b<e>"]


def test_an_end_token_behind_the_mark_is_learnt_too() -> None:
    tokenizer = byte_tokenizer()
    end, mark = "{{- eos_token }}", "{%- endgeneration %}"
    source = re.sub(rf"{re.escape(end)}\s*{re.escape(mark)}", mark + end, TURNS)
    assert source != TURNS
    document = chat_encoder(tokenizer, source, turn="|").document(TWO_TURNS)
    assert learnt_texts(tokenizer, document) == ["one two<e>", "three<e>"]


def test_a_token_that_the_template_reads_is_the_templates() -> None:
    """<think> in the assistant's content is taken apart by templates of reasoning models."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    source = """{%- for message in messages %}
    {%- if '</think>' in message.content and message.role == 'assistant' %}
        {%- set parts = message.content.split('</think>') %}
        {{- '|assistant:<think>' + parts[0].split('<think>')[-1].strip() }}
        {{- '</think>' + parts[1].strip() + eos_token }}
    {%- else %}{{- '|' + message.role + ':' + message.content + eos_token }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '|assistant:' }}{%- endif %}"""
    said = conversation(("user", "</think> a <e>"), ("assistant", "<think> r <e></think> b"))
    document = chat_encoder(tokenizer, source).document(said)
    ids = document.tokens.tolist()
    think, close = (tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>"))
    assert tokenizer.decode(ids) == "|user:</think> a <e><e>|assistant:<think>r <e></think>b<e>"
    assert (ids.count(think), ids.count(close), ids.count(tokenizer.eos_token_id)) == (1, 1, 2)
    assert learnt_texts(tokenizer, document) == ["<think>r <e></think>b<e>"]


def test_a_template_that_needs_arguments_as_text_gets_them() -> None:
    source = without_marks(TURNS)
    source = source.replace("call.function | tojson", "call.function.name + call.function.arguments")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"é": 1}}]},
    ]
    document = chat_encoder(byte_tokenizer(), source, turn="|").document(conversation(messages=messages))
    assert learnt_texts(byte_tokenizer(), document) == ['f{"é": 1}<e>']
