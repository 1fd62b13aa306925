"""How `flora-train chat` writes a conversation for the model: by a chat template, or a text as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from flora_train.config.errors import first_line, user_error
from flora_train.data.chat.encoder import ChatEncoder
from flora_train.data.chat.end_of_turn import end_of_turn
from flora_train.data.chat.messages import Conversation
from flora_train.data.text_encoder import TextEncoder

Message = dict[str, str]
"""Role and content."""


class Prompter(Protocol):
    """Makes the tokens of a prompt."""

    end_tokens: frozenset[int]
    """Tokens that end an answer."""
    stops: tuple[str, ...]
    """Strings that end it."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which the model answers the last message. Raises UserError."""
        ...


class TemplatePrompter:
    """Writes a conversation by a chat template."""

    def __init__(self, encoder: ChatEncoder, system: str | None = None) -> None:
        self._encoder, self._system = encoder, system
        self.end_tokens, self.stops = end_of_turn(encoder)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        all_messages = list(messages)
        if self._system is not None:
            all_messages.insert(0, {"role": "system", "content": self._system})
        try:
            return self._encoder.prompt(Conversation(tuple(all_messages))).tolist()
        except ValueError as error:
            raise user_error("chat_template", None, first_line(error)) from None


class PlainPrompter:
    """Lets the model continue the last text as it is, without a template and what was said before."""

    end_tokens: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        ids = self._encoder.prompt(messages[-1]["content"], special_tokens=False)
        if not ids:
            raise user_error("the text", messages[-1]["content"], "has no tokens: give the model some text")
        return ids
