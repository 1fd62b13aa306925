"""The announcement of a server: requests that a shell and Python read as they are meant."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace
from typing import Any

import pytest

from flora_train.commands.serve_text import MOST_LISTED, Example, announcement, curl_line, python_snippet

ADDRESS = "http://127.0.0.1:8000"
NAMES = ["lua-flora", "it's $HOME `x`", 'a "b" \\', "ü\u202e\n"]
PROMPTS = ["local function", "'; rm -rf / #", 'line\n$(x) "y" \\n', "emoji \U0001f600"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_shell_reads_the_curl_line(name: str, prompt: str) -> None:
    words = shlex.split(curl_line(ADDRESS, Example(name, prompt)))
    assert words[:2] == ["curl", f"{ADDRESS}/v1/completions"]
    content = json.loads(words[words.index("-d") + 1])
    assert content == {"model": name, "prompt": prompt, "max_tokens": 32}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_python_reads_the_snippet(name: str, prompt: str) -> None:
    lines = python_snippet(ADDRESS, Example(name, prompt)).splitlines()
    request = next(line for line in lines if line.startswith("answer ="))
    read: dict[str, Any] = {}
    completions = SimpleNamespace(create=lambda **values: read.update(values))
    exec(request, {"client": SimpleNamespace(completions=completions)})
    assert read == {"model": name, "prompt": prompt, "max_tokens": 32}


def test_messages_are_a_chat() -> None:
    example = Example("lua-flora", messages=[{"role": "user", "content": "Hello"}])
    words = shlex.split(curl_line(ADDRESS, example))
    assert words[1] == f"{ADDRESS}/v1/chat/completions"
    assert json.loads(words[-1])["messages"] == [{"role": "user", "content": "Hello"}]
    assert "client.chat.completions.create(model='lua-flora', messages=[{" in python_snippet(ADDRESS, example)


def test_a_key_is_a_variable() -> None:
    line = curl_line(ADDRESS, Example("a"), has_key=True)
    assert '-H "Authorization: Bearer $VLLM_API_KEY"' in line
    snippet = python_snippet(ADDRESS, Example("a"), has_key=True)
    assert snippet.startswith("import os\n")
    assert 'api_key=os.environ["VLLM_API_KEY"]' in snippet


def test_many_adapters_are_counted_and_control_characters_are_escaped() -> None:
    adapters = {f"adapter-{i}": "LoRA, rank 8" for i in range(1000)}
    text = announcement(ADDRESS, ("base", "models/a\x1b[31m"), adapters, example=Example("adapter-0"), more=5)
    assert text.count("LoRA, rank 8") == MOST_LISTED
    assert f"and {1000 - MOST_LISTED} more: {ADDRESS}/v1/models lists them" in text
    assert "and 5 that are loaded when they are first requested" in text
    assert "\x1b" not in text
