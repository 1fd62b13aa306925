"""Keys of conversations: which belong together, and which belong to other tasks."""

from __future__ import annotations

from typing import Any

import pytest

from flora_train.config.errors import UserError
from tests.unit.data.conftest import run_config


@pytest.mark.parametrize(
    "task",
    [
        {"messages": "chats", "tools": "functions", "chat_template": "chatml", "learn": "last"},
        {"prompt": "prompt", "completion": "completion", "learn": "all"},
        {"learn": "assistant"},
    ],
)
def test_keys_that_belong_together(task: dict[str, Any]) -> None:
    read = run_config({"t": {"train": "a.jsonl", **task}}).tasks["t"]
    assert {key: getattr(read, key) for key in task} == task


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (
            {"messages": "a", "prompt": "b", "completion": "c"},
            "give messages, or prompt and completion, not both",
        ),
        ({"messages": "a", "text": "b"}, "is learnt as a whole, and messages belongs to conversations"),
        ({"learn": "last", "text": "b"}, "is learnt as a whole, and learn belongs to conversations"),
        ({"learn": "first"}, "tasks.t.learn"),
        ({"messages": " "}, "is empty: give a value, or remove the key"),
        ({"chat_template": "a.jinja", "speech": {"language": "cs"}}, "chat_template to a task of text"),
    ],
)
def test_keys_that_do_not(task: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config({"t": {"train": "a.jsonl", **task}})
    assert line in str(caught.value)
