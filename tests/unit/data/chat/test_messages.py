"""Conversations of rows in the layouts that people have, and rows that are none."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from flora_train.data.chat.messages import ChatColumns, is_message_list, parse_conversation
from tests.unit.data.chat.chats import COLUMNS

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": None, "b": 1}}}


def parsed(messages: Any, merged: bool = False, **row: Any) -> Any:
    return parse_conversation({"messages": messages, **row}, COLUMNS, merged=merged)


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([USER, ANSWER], id="openai"),
        pytest.param(json.dumps([USER, ANSWER]), id="json text"),
        pytest.param([{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWER], id="parts"),
        pytest.param(
            [{"role": "user", "content": ["h", {"type": "text", "text": "i"}]}, ANSWER], id="two parts"
        ),
        pytest.param({"role": ["user", "assistant"], "content": ["hi", "yes"]}, id="columns"),
        pytest.param([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], id="sharegpt"),
        pytest.param([{"from": "user", "value": "hi"}, {"from": "model", "value": "yes"}], id="other names"),
        pytest.param(
            [{"role": "user", "content": "hi", "tool_calls": None, "from": None}, ANSWER], id="empty fields"
        ),
    ],
)
def test_layouts_of_one_conversation_are_read_alike(messages: Any) -> None:
    assert parsed(messages).messages == (USER, ANSWER)


def test_tool_calls_in_every_layout_are_functions_with_arguments_as_objects() -> None:
    function = {"name": "f", "arguments": {"b": 1}}
    expected = [{"type": "function", "function": function}]
    for calls in (
        [{"type": "function", "function": {"name": "f", "arguments": '{"b": 1}'}}],
        [{"function": function}],
        [function],
        function,
        json.dumps([function]),
        [{"name": "f", "parameters": {"b": 1}}],
    ):
        message = parsed([USER, {"role": "assistant", "content": None, "tool_calls": calls}]).messages[1]
        assert message == {"role": "assistant", "tool_calls": expected}
    old = parsed(
        [USER, {"role": "assistant", "function_call": function}, {"role": "function", "content": "2"}]
    )
    assert old.messages[1]["tool_calls"] == expected
    assert old.messages[2]["role"] == "tool"
    shared = parsed(
        [{"from": "human", "value": "hi"}, {"from": "function_call", "value": json.dumps(function)}]
    )
    assert shared.messages[1] == {"role": "assistant", "tool_calls": expected}


def test_arguments_of_records_lose_the_fields_of_other_records_and_those_of_json_keep_null() -> None:
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    arguments = [
        parsed(messages, merged=merged).messages[1]["tool_calls"][0]["function"]["arguments"]
        for merged in (False, True)
    ]
    assert arguments == [{"a": None, "b": 1}, {"b": 1}]
    in_text = {**CALL, "function": {"name": "f", "arguments": '{"a": null}'}}
    kept = parsed([USER, {"role": "assistant", "tool_calls": [in_text]}], merged=True).messages[1]
    assert kept["tool_calls"][0]["function"]["arguments"] == {"a": None}


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_wrapped_as_functions(as_text: bool) -> None:
    tools: Any = [{"name": "f", "parameters": {}}, {"type": "function", "function": {"name": "g"}}]
    given = json.dumps(tools) if as_text else tools
    names = [tool["function"]["name"] for tool in parsed([USER, ANSWER], tools=given).tools]
    assert names == ["f", "g"]
    assert parsed([USER, ANSWER], tools=None).tools == parsed([USER, ANSWER], tools="").tools == ()


def test_weights_and_train_say_what_may_be_learnt() -> None:
    messages = [
        USER,
        {**ANSWER, "weight": 0},
        {**ANSWER, "weight": 1},
        {**ANSWER, "train": False},
        {**ANSWER, "train": True},
        {**ANSWER, "weight": 1.0, "train": False},
    ]
    found = parsed(messages)
    assert found.selected == (True, False, True, False, True, False)
    assert all(message == ANSWER for message in found.messages[1:])


def test_system_column_comes_first_unless_the_messages_have_one() -> None:
    assert parsed([USER, ANSWER], system="Be brief.").messages[0] == {
        "role": "system",
        "content": "Be brief.",
    }
    assert parsed([USER, ANSWER], system=" ").messages == (USER, ANSWER)
    own = {"role": "system", "content": "own"}
    assert parsed([own, USER, ANSWER], system="other").messages == (own, USER, ANSWER)


def test_prompt_messages_are_read_and_completion_messages_learnt() -> None:
    columns = ChatColumns(prompt="prompt", completion="completion")
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert parse_conversation(row, columns, merged=False).selected == (False, False, False, True)


def test_half_of_a_surrogate_pair_is_replaced() -> None:
    assert parsed([{**USER, "content": "a\ud800"}, ANSWER]).messages[0]["content"] == "a\ufffd"


def test_a_list_of_messages_is_recognized() -> None:
    assert is_message_list([USER])
    assert is_message_list(json.dumps([{"from": "human", "value": "x"}]))
    for other in (None, [], "text", "[1]", ["a"], [{"text": "a"}], {"role": "user"}, "[{"):
        assert not is_message_list(other)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "has no 'messages': give it messages, or remove the row"),
        ([], "'messages' is an empty conversation: give it messages, or remove the row"),
        ("hi", "'messages' is text that is not JSON"),
        ({"role": "user"}, "'messages' holds a dict: it must be a list of messages"),
        (["hi"], "message 1 of 'messages' is a str: it must be an object with role and content"),
        ([{"text": "hi"}], "message 1 of 'messages' has neither role nor from: it has the keys text"),
        ([USER, {"role": "robot", "content": "x"}], "message 2 of 'messages' has the unknown role 'robot'"),
        ([{"role": "human", "content": "x"}], "Write 'user'."),
        ([{"role": "usr", "content": "x"}], "Did you mean 'user'?"),
        ([{"from": "robot", "value": "x"}], "message 1 of 'messages' is from the unknown role 'robot'"),
        ([{"role": "user"}], "message 1 of 'messages' (user) has no content"),
        (
            [USER, {"role": "assistant", "content": None}],
            "message 2 of 'messages' (assistant) has no content",
        ),
        ([{"role": "user", "content": 3}], "has a content that is a int: it must be text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "has a content part of type 'image_url': only text can be learnt",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "has a content part of type 'text' without text"),
        ([{**ANSWER, "weight": 0.5}], "has the weight 0.5: it must be 0 (not learnt) or 1"),
        ([{**ANSWER, "weight": "1"}], "has the weight '1'"),
        ([{**ANSWER, "train": 1}], "has train = 1: it must be true or false"),
        ([{**USER, "tool_calls": [CALL]}], "only the assistant calls tools"),
        ([{**ANSWER, "tool_calls": [{"function": {"arguments": {}}}]}], "has a tool call without a name"),
        ([{**ANSWER, "tool_calls": [{"function": {"name": " "}}]}], "has a tool call without a name"),
        (
            [{**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "calls 'f' with arguments in text that is not JSON",
        ),
        (
            [{**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}],
            "calls 'f' with arguments that are a list",
        ),
        ([{**ANSWER, "tool_calls": [{"type": "web", "name": "f"}]}], "has a tool call of type 'web'"),
        ([{**ANSWER, "tool_calls": "[{"}], "has tool calls in text that is not JSON"),
        ([{**ANSWER, "tool_calls": 3}], "has tool_calls that are a int"),
    ],
)
def test_what_is_no_conversation_is_an_error_with_message_and_fix(messages: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        parsed(messages)


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("[{", "'tools' is text that is not JSON"),
        (3, "'tools' holds a int: it must be a list of tools, or JSON of one"),
        ([3], "tool 1 of 'tools' is a int"),
        ([{"type": "function", "function": {}}], "tool 1 of 'tools' has no name"),
        (['{"name"'], "tool 1 of 'tools' is text that is not JSON"),
    ],
)
def test_what_are_no_tools_is_an_error_with_the_column(tools: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        parsed([USER, ANSWER], tools=tools)
