"""Sample prompts as a model reads them: texts as they are, conversations by the task's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flora_train.config.errors import first_line, user_error
from flora_train.config.task_schema import TaskConfig
from flora_train.data.chat.encoder import ChatEncoder
from flora_train.data.chat.end_of_turn import end_of_turn
from flora_train.data.chat.messages import Conversation, parse_messages
from flora_train.data.chat.template import ChatTemplate


@dataclass(frozen=True)
class Prompt:
    """What a model continues."""

    content: str | tuple[int, ...]
    """A text whose special tokens are tokens, or token ids."""
    end_tokens: frozenset[int] = frozenset()
    """Tokens that end the continuation, beside the model's own end tokens."""
    stops: tuple[str, ...] = ()
    """Strings that end it."""


def sample_prompts(task: TaskConfig, tokenizer: Any, key: str) -> list[Prompt]:
    """A task's sample prompts. key: the task's configuration key.

    Raises UserError if there is no chat template for messages, or it cannot render them.
    """
    encoder: ChatEncoder | None = None
    prompts: list[Prompt] = []
    for number, prompt in enumerate(task.sample_prompts):
        if isinstance(prompt, str):
            prompts.append(Prompt(prompt))
            continue
        if encoder is None:
            encoder = ChatEncoder(ChatTemplate.of(tokenizer, task.chat_template, key), tokenizer)
        try:
            conversation = Conversation(tuple(parse_messages(prompt)))
            ids = tuple(encoder.prompt(conversation).tolist())
        except ValueError as error:
            raise user_error(f"{key}.sample_prompts.{number}", prompt, first_line(error)) from None
        end_tokens, stops = end_of_turn(encoder)
        prompts.append(Prompt(ids, end_tokens, stops))
    return prompts
