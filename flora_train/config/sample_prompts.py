"""Sample prompts of a task: texts, or conversations that the model answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from flora_train.config.base import Text
from flora_train.config.errors import choices

ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWERED = ("user", "tool")
"""Roles of messages that a model answers."""

Messages = list[dict[str, Any]]
"""Messages with role and content, and what else chat templates read (name, tool_calls)."""


def _check_messages(messages: Messages) -> Messages:
    """Messages that end with one to answer. Raises ValueError."""
    for number, message in enumerate(messages, start=1):
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {number} must have a role: {choices(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise ValueError(f"message {number} ({role}) must have a content, which is text")
    last = messages[-1]["role"]
    if last not in ANSWERED:
        raise ValueError(
            f"ends with a message of the role {last}: the last one must be from {choices(ANSWERED)}"
        )
    return messages


def _check_form(value: Any) -> Any:
    """A text or a list of objects. Raises ValueError for others."""
    if isinstance(value, Mapping):
        raise ValueError(
            "is one message: a prompt is a list of messages, [[{role: user, content: ...}], ...]"
        )
    if value is None or isinstance(value, bool):
        raise ValueError("must be text (in quotes, where YAML reads something else), or a list of messages")
    if isinstance(value, list):
        for number, message in enumerate(value, start=1):
            if not isinstance(message, Mapping):
                raise ValueError(f"message {number} must have keys: role and content")
    return value


def _form(value: Any) -> str:
    """The alternative of a prompt that is meant."""
    return "messages" if isinstance(value, list) else "text"


SamplePrompt = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[Messages, Field(min_length=1), AfterValidator(_check_messages), Tag("messages")],
    Discriminator(_form),
    BeforeValidator(_check_form),
]
"""A text that is continued, or messages that are answered."""
