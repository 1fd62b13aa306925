"""Rows of conversations as tasks: columns, truncation, counts, the cache's key, errors that name a row."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.data.chat.rows import ChatRowEncoder
from flora_train.data.documents import EncodedExample, LocatedRow
from flora_train.data.encoding import Workers
from flora_train.data.encoding_worker import EncoderArguments
from flora_train.data.row_encoders import make_row_encoder
from flora_train.data.text_rows import TextRowEncoder
from tests.rows import located, outline_of
from tests.unit.data.chat.chats import TURNS, learnt_texts
from tests.unit.data.conftest import byte_tokenizer, run_config

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
TEMPLATE = TURNS.replace("{{- start }}", "{%- set turn = '|' %}")
CHAT = {"messages": [USER, ANSWER]}


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encoder(
    tokenizer: Any, rows: list[dict[str, Any]], *, max_length: int = 200, **task: Any
) -> ChatRowEncoder | TextRowEncoder:
    config = run_config({"t": {"train": "unused.jsonl", **task}}).tasks["t"]
    made = make_row_encoder(config, tokenizer, rows=outline_of(rows), max_length=max_length, key="tasks.t")
    assert isinstance(made, ChatRowEncoder | TextRowEncoder)
    return made


def encoded(tokenizer: Any, rows: list[dict[str, Any]], **task: Any) -> list[EncodedExample]:
    made = encoder(tokenizer, rows, **task)
    assert isinstance(made, ChatRowEncoder)
    return list(made.encode(located(rows, "chats.jsonl")))


def learnt(tokenizer: Any, examples: list[EncodedExample]) -> list[list[str]]:
    return [
        [text for document in example.documents for text in learnt_texts(tokenizer, document)]
        for example in examples
    ]


@pytest.mark.parametrize(
    ("row", "task", "texts"),
    [
        (CHAT, {}, ["yes<e>"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {}, ["b<e>"]),
        ({"messages": json.dumps(CHAT["messages"]), "text": "whole"}, {}, ["yes<e>"]),
        ({"dialogue": CHAT["messages"]}, {"messages": "dialogue"}, ["yes<e>"]),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, {}, ["yes<e>"]),
        ({"q": [USER], "a": [ANSWER]}, {"prompt": "q", "completion": "a"}, ["yes<e>"]),
        ({"messages": [USER, ANSWER, USER, {**ANSWER, "content": "no"}]}, {"learn": "last"}, ["no<e>"]),
        (CHAT, {"learn": "all"}, ["|user:hi<e>|assistant:yes<e>"]),
        ({"prompt": [USER], "completion": [ANSWER]}, {"learn": "all"}, ["|assistant:yes<e>"]),
        ({"messages": [USER, ANSWER, {**ANSWER, "content": "b", "weight": 0}]}, {}, ["yes<e>"]),
    ],
)
def test_columns_of_conversations_are_found_or_named(
    tokenizer: Any, row: dict[str, Any], task: dict[str, Any], texts: list[str]
) -> None:
    assert learnt(tokenizer, encoded(tokenizer, [row], **task)) == [texts]


@pytest.mark.parametrize("value", ['[{"role": "user"', "a note", 5, {}])
def test_a_first_row_that_is_malformed_is_named(tokenizer: Any, value: Any) -> None:
    with pytest.raises(UserError, match=r"tasks\.t: chats\.jsonl, row 1: 'messages'"):
        encoded(tokenizer, [{"messages": value}, CHAT])


def test_other_rows_stay_text(tokenizer: Any) -> None:
    for row in ({"text": "a"}, {"prompt": "a", "completion": "b"}, {"messages": "a note", "text": "b"}):
        assert isinstance(encoder(tokenizer, [row]), TextRowEncoder)
    assert isinstance(encoder(tokenizer, [{**CHAT, "text": "a"}], text="text"), TextRowEncoder)


def test_tools_and_system_columns_are_read(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE + "{%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}"
    tool = {"type": "function", "function": {"name": "f"}}
    for column in ("tools", "functions"):
        (example,) = encoded(tokenizer, [{**CHAT, column: json.dumps([tool]), "system": "Be brief."}])
        (document,) = example.documents
        text = tokenizer.decode(document.tokens)
        assert text.startswith("|system:Be brief.<e>")
        assert text.endswith(json.dumps(tool))


@pytest.mark.parametrize("truncation", ["truncate", "split", "drop"])
def test_what_is_cut_off_is_counted_and_the_rest_is_learnt(tokenizer: Any, truncation: str) -> None:
    two = [USER, ANSWER, USER, {**ANSWER, "content": "second"}]
    whole = len("|user:hi<e>|assistant:yes<e>") - 4  # an end token is one token
    fates = {}
    for limit in (200, whole + 22, whole, whole - 1, whole - 4, 3):
        (example,) = encoded(tokenizer, [{"messages": two}], max_length=limit, truncation=truncation)
        fates[limit] = example.fate, learnt(tokenizer, [example])[0]
        assert all(len(document.tokens) <= limit for document in example.documents)
    assert fates[200] == ("whole", ["yes<e>", "second<e>"])
    if truncation == "drop":
        assert {fate for fate, _ in list(fates.values())[1:]} == {"drop"}
        return
    assert fates[whole + 22] == ("truncate", ["yes<e>", "se"])
    assert fates[whole] == ("truncate", ["yes<e>"])
    assert fates[whole - 1] == ("truncate", ["yes"])
    assert fates[whole - 4] == fates[3] == ("prompt_too_long", [])


def test_conversations_that_are_learnt_whole_are_split_like_texts() -> None:
    tokenizer = byte_tokenizer(start=True)
    tokenizer.chat_template = "{{- bos_token }}" + TEMPLATE
    (example,) = encoded(
        tokenizer,
        [{"messages": [USER, {**ANSWER, "content": "yes" * 20}]}],
        max_length=40,
        learn="all",
        truncation="split",
    )
    assert example.fate == "split"
    assert len(example.documents) == 3
    assert all(document.tokens[0] == tokenizer.bos_token_id for document in example.documents)
    text = "".join(tokenizer.decode(document.tokens[1:]) for document in example.documents)
    assert text == f"|user:hi<e>|assistant:{'yes' * 20}<e>"


def test_rows_without_text_to_learn_are_empty(tokenizer: Any) -> None:
    nothing = [{**ANSWER, "content": " "}], [{**ANSWER, "weight": 0}], [ANSWER, {**ANSWER, "train": False}]
    for messages, learn in zip(nothing, ("assistant", "assistant", "last"), strict=True):
        (example,) = encoded(tokenizer, [{"messages": [USER, *messages]}], learn=learn)
        assert (example.fate, example.documents) == ("empty", ())
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    (example,) = encoded(tokenizer, [{"messages": [USER, call]}])
    assert example.fate == "whole"


def test_special_tokens_in_rows_are_counted(tokenizer: Any) -> None:
    (example,) = encoded(tokenizer, [{"messages": [{**USER, "content": "a<e>b<p>"}, ANSWER]}])
    assert example.special_tokens == {"<e>": 1, "<p>": 1}


def test_everything_that_tokens_depend_on_is_in_the_key_of_the_cache(tokenizer: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATE)
    settings = [
        encoder(tokenizer, [CHAT], **task).setting
        for task in ({}, {"learn": "last"}, {"special_tokens": True}, {"truncation": "drop"})
    ]
    settings.append(encoder(tokenizer, [CHAT], max_length=100).setting)
    assert len({json.dumps(setting, sort_keys=True) for setting in settings}) == 5
    assert encoder(tokenizer, [CHAT], chat_template=str(other)).setting == settings[0]
    other.write_text("x" + TEMPLATE)
    assert encoder(tokenizer, [CHAT], chat_template=str(other)).setting != settings[0]


def test_records_of_parquet_lose_the_fields_of_other_records(tokenizer: Any) -> None:
    call = {"function": {"name": "f", "arguments": {"a": None, "b": 1}}}
    rows = [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call], "name": None}]}]
    made = encoder(tokenizer, rows)
    assert isinstance(made, ChatRowEncoder)
    texts = []
    for file in ("a.parquet", "a.jsonl"):
        texts += learnt(tokenizer, list(made.encode(located(rows, file))))
    assert texts[0] == ['{"name": "f", "arguments": {"b": 1}}<e>']
    assert texts[1] == ['{"name": "f", "arguments": {"a": null, "b": 1}}<e>']


def test_other_processes_encode_the_same_and_name_the_same_bad_row(tokenizer: Any) -> None:
    rows = located([CHAT, {"messages": [USER, ANSWER, USER, ANSWER]}], "chats.jsonl")
    config = run_config({"t": {"train": "unused.jsonl", "learn": "last"}}).tasks["t"]
    arguments = EncoderArguments(config, tokenizer, outline_of([CHAT]), 200, "tasks.t")
    here = encoded(tokenizer, [row.cells for row in rows], learn="last")
    with Workers(arguments, 1) as workers:
        assert workers.are_ready()
        ((_, there),) = workers.encode(iter([(0, rows)]))
        assert [learnt(tokenizer, [a]) for a in there] == [learnt(tokenizer, [a]) for a in here]
        bad = [LocatedRow({"messages": []}, "chats.jsonl", 7)]
        with pytest.raises(
            UserError, match=r"tasks\.t: chats\.jsonl, row 7: 'messages' is an empty conversation"
        ):
            list(workers.encode(iter([(0, bad)])))


def test_tokens_that_the_base_lacks_are_named_once(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (example,) = encoded(tokenizer, [CHAT], chat_template="chatml")
    assert [record.message for record in caplog.records] == [
        "tasks.t: the base has no token for <|im_end|>, <|im_start|> of the chat template: ordinary text"
    ]
    (document,) = example.documents
    assert learnt_texts(tokenizer, document) == ["yes<|im_end|><e>"]
    assert int(document.tokens.max()) < len(tokenizer)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "'messages' is an empty conversation"),
        ([USER, {"role": "robot", "content": "x"}], "message 2 of 'messages' has the unknown role 'robot'"),
        ([USER, USER], "the conversation has no turn of the assistant, so that nothing is learnt: add one"),
        ([{**ANSWER, "weight": 2}], "message 1 of 'messages' has the weight 2: it must be 0"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], "has a tool call without a name"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ANSWER], "of type 'image_url'"),
        ([{"role": "tool", "content": "x"}, ANSWER], "cannot render it: no tools"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tokenizer: Any, messages: Any, reason: str) -> None:
    tokenizer.chat_template = (
        "{%- if messages[0].role == 'tool' %}{{- raise_exception('no tools') }}{%- endif %}"
    )
    tokenizer.chat_template += TEMPLATE
    with pytest.raises(UserError) as caught:
        encoded(tokenizer, [CHAT, CHAT, {"messages": messages}])
    (problem,) = caught.value.problems
    assert str(problem).startswith("tasks.t: chats.jsonl, row 3: ")
    assert reason in str(problem)


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (
            {"messages": "mesages"},
            "'mesages' is not a column of the training rows; they have messages. Did you mean 'messages'?",
        ),
        ({"tools": "tool"}, "tasks.t.tools = 'tool': 'tool' is not a column of the training rows"),
        ({"chat_template": "chatmi"}, "names are chatml, default or plain. Did you mean 'chatml'?"),
        ({"chat_template": "absent.jinja"}, "tasks.t.chat_template = 'absent.jinja': no such file in"),
        (
            {"chat_template": "broken.jinja"},
            "tasks.t.chat_template = 'broken.jinja': is not a template: line 2: ",
        ),
    ],
)
def test_wrong_keys_are_errors_with_a_fix(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: dict[str, Any], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jinja").write_text("a\n{% for %}")
    with pytest.raises(UserError) as caught:
        encoder(tokenizer, [CHAT], **task)
    assert line in str(caught.value)


def test_a_base_without_a_template_needs_one_that_is_named() -> None:
    with pytest.raises(UserError) as caught:
        encoder(byte_tokenizer(), [CHAT])
    assert "tasks.t.chat_template: is needed: the base's tokenizer has no chat template" in str(caught.value)
    assert "for example chat_template: plain" in str(caught.value)


@pytest.mark.parametrize("key", ["learn", "chat_template", "tools"])
def test_keys_of_conversations_are_errors_for_text(tokenizer: Any, key: str) -> None:
    value = "last" if key == "learn" else "chatml"
    with pytest.raises(UserError, match=rf"tasks\.t\.{key} = '{value}': is for conversations, and no column"):
        encoder(tokenizer, [{"text": "a", "tools": "b"}], **{key: value})


def test_a_validation_column_that_is_missing_is_an_error(tokenizer: Any) -> None:
    made = encoder(tokenizer, [CHAT])
    with pytest.raises(UserError, match="'messages' is not a column of the validation rows"):
        made.check(outline_of([{"text": "a"}]), "validation")
