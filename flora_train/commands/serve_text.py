"""What `flora-train serve` prints when its server is ready: models, address, and requests that work."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora_train.config.terminal_text import plain

MAX_TOKENS = 32
PROMPT = "Once upon a time"
MOST_LISTED = 24
"""Adapters that are listed by name."""
KEY_VARIABLE = "VLLM_API_KEY"


@dataclass(frozen=True)
class Example:
    """A request: a text to continue, or messages to answer."""

    model: str
    prompt: str = PROMPT
    messages: Sequence[Mapping[str, Any]] | None = None

    @property
    def path(self) -> str:
        return "/v1/completions" if self.messages is None else "/v1/chat/completions"

    @property
    def content(self) -> dict[str, Any]:
        if self.messages is None:
            return {"model": self.model, "prompt": self.prompt, "max_tokens": MAX_TOKENS}
        return {"model": self.model, "messages": list(self.messages), "max_tokens": MAX_TOKENS}


def announcement(
    address: str,
    base: tuple[str, str],
    adapters: Mapping[str, str],
    *,
    example: Example,
    more: int = 0,
    has_key: bool = False,
) -> str:
    """base: its name in requests, and where it is from; adapters: name -> method and rank; more: number of
    adapters that are loaded when they are first requested; has_key: clients must send a key."""
    name, path = base
    listed = dict(list(adapters.items())[:MOST_LISTED])
    width = max(map(len, [name, *listed]))
    lines = [f"serving at {address}/v1 (Ctrl-C ends it)", f"  {name:{width}}  base model {path}"]
    lines += [f"  {adapter:{width}}  {form}" for adapter, form in listed.items()]
    if len(adapters) > len(listed):
        lines.append(f"  and {len(adapters) - len(listed):,} more: {address}/v1/models lists them")
    if more:
        lines.append(f"  and {more:,} that are loaded when they are first requested")
    lines += ["", curl_line(address, example, has_key), "", python_snippet(address, example, has_key)]
    return "\n".join(plain(line) for line in lines)


def curl_line(address: str, example: Example, has_key: bool = False) -> str:
    """A command for a POSIX shell."""
    words = ["curl", f"{address}{example.path}", "-H", shlex.quote("Content-Type: application/json")]
    if has_key:
        words += ["-H", f'"Authorization: Bearer ${KEY_VARIABLE}"']
    return " ".join([*words, "-d", shlex.quote(json.dumps(example.content))])


def python_snippet(address: str, example: Example, has_key: bool = False) -> str:
    """Python source for the package `openai`."""
    lines = ["from openai import OpenAI", ""]
    key = '"none"'
    if has_key:
        lines.insert(0, "import os")
        key = f'os.environ["{KEY_VARIABLE}"]'
    lines.append(f'client = OpenAI(base_url="{address}/v1", api_key={key})')
    arguments = ", ".join(f"{name}={value!a}" for name, value in example.content.items())
    if example.messages is None:
        lines += [f"answer = client.completions.create({arguments})", "print(answer.choices[0].text)"]
    else:
        lines += [
            f"answer = client.chat.completions.create({arguments})",
            "print(answer.choices[0].message.content)",
        ]
    return "\n".join(lines)
