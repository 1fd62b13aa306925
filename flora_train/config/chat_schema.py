"""Keys of tasks of conversations."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationInfo, field_validator

from flora_train.config.base import ConfigModel, PathText, Text

CHAT_KEYS = ("messages", "tools", "chat_template", "learn")


class ChatKeys(ConfigModel):
    """The keys of a task whose rows are conversations."""

    messages: Text | None = None
    """Column of conversations: lists of messages with role and content (OpenAI), or with from and value
    (ShareGPT), or JSON text of one. Default: the column messages or conversations, if rows have one and no
    other format is given."""
    tools: Text | None = None
    """Column of the functions that the assistant of a conversation may call: a list of definitions, or JSON
    text of one. Default: tools, if rows have it."""
    chat_template: PathText | None = None
    """Template that renders conversations: a .jinja file, the name of a template of the base's tokenizer, or
    one that is shipped: chatml, or plain for tokenizers without tokens for chats. Default: the tokenizer's
    own."""
    learn: Literal["assistant", "last", "all"] | None = None
    """What is learnt of a conversation. assistant: every turn of the assistant, with its end token. last: the
    last of these turns. all: everything. Messages with weight: 0 or train: false are never learnt. Default:
    assistant."""

    @field_validator(*CHAT_KEYS)
    @classmethod
    def _is_not_empty(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty: give a value, or remove the key")
        return value


def chat_key_of(info: ValidationInfo) -> str | None:
    """The first key of a conversation that a task has been given."""
    return next((key for key in CHAT_KEYS if info.data.get(key) is not None), None)
