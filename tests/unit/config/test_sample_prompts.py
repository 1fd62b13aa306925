"""Sample prompts are texts or lists of messages; everything else is one error."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from flora_train.config.errors import UserError
from flora_train.config.load import load_config
from flora_train.config.schema import RunConfig

USER = {"role": "user", "content": "hi"}


def config(prompts: Any) -> RunConfig:
    return load_config(
        ["recipe=quickstart", f"tasks.lua.sample_prompts={yaml.safe_dump(prompts, width=10_000)}"]
    )


def test_texts_and_messages_are_kept() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    prompts = ["a text", [USER], [USER, call, {"role": "tool", "name": "f", "content": "2"}], "{braces}"]
    assert config(prompts).tasks["lua"].sample_prompts == prompts


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", "must not be empty"),
        ([], r"must have at least 1 item\(s\)"),
        (
            USER,
            r"is one message: a prompt is a list of messages, .*role: user, content: .*",
        ),
        (None, "must be text .*, or a list of messages"),
        (True, "must be text .*, or a list of messages"),
        (["hi"], "message 1 must have keys: role and content"),
        ([{"content": "hi"}], "message 1 must have a role: assistant, developer, system, tool or user"),
        ([{"role": "usr", "content": "hi"}], "message 1 must have a role: .*"),
        ([USER, {"role": ["user"], "content": "hi"}], "message 2 must have a role: .*"),
        ([{"role": "user"}], r"message 1 \(user\) must have a content, which is text"),
        ([{"role": "user", "content": 3}], r"message 1 \(user\) must have a content, which is text"),
        (
            [USER, {"role": "assistant", "content": "a"}],
            "ends with a message of the role assistant: .* tool or user",
        ),
    ],
)
def test_other_values_are_one_error(prompt: Any, error: str) -> None:
    with pytest.raises(UserError) as raised:
        config([USER["content"], prompt])
    (problem,) = raised.value.problems
    assert problem.key == "tasks.lua.sample_prompts.1"
    assert re.fullmatch(error, problem.hint)
