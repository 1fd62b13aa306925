"""The tokens or strings that end an assistant's turn, as a chat template writes them."""

from __future__ import annotations

from collections.abc import Iterator

from flora_train.data.chat.encoder import ChatEncoder
from flora_train.data.chat.messages import Conversation, Message

WORDS = ("alpha", "omega", "theta")
"""Contents of the probed conversation, which templates write as they are."""


def end_of_turn(encoder: ChatEncoder) -> tuple[frozenset[int], tuple[str, ...]]:
    """(special tokens, strings) that end a turn.

    Where no special token follows what the assistant says, a turn ends where the template begins the next
    one. Both are empty for a template that separates turns by white space only, or cannot be probed.
    """
    try:
        tokens = frozenset(_special_after_content(encoder))
        strings = () if tokens else tuple(_text_after_content(encoder))
    except ValueError:  # the template accepts no such conversation
        return frozenset(), ()
    return tokens, strings


def _special_after_content(encoder: ChatEncoder) -> Iterator[int]:
    """The special tokens at the end of a learnt turn, with nothing but white space between them."""
    document = encoder.document(_conversation(2), learn="last")
    learnt = [int(token) for begin, end in document.spans for token in document.tokens[begin:end]]
    for token in reversed(learnt):
        if token in encoder.text.special:
            yield token
        elif encoder.tokenizer.decode([token]).strip():
            return


def _text_after_content(encoder: ChatEncoder) -> Iterator[str]:
    """What stands between the assistant's content and the next message."""
    text = encoder.template.render(_conversation(3)).text
    _, found, rest = text.partition(WORDS[1])
    between, found_next, _ = rest.partition(WORDS[2])
    if found and found_next and between.strip():
        yield between.rstrip()


def _conversation(length: int) -> Conversation:
    roles = ("user", "assistant", "user")
    messages: list[Message] = [
        {"role": role, "content": word} for role, word in zip(roles, WORDS, strict=True)
    ]
    return Conversation(tuple(messages[:length]))
