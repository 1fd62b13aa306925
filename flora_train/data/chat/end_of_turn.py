"""The tokens or strings that end an assistant's turn, as a chat template writes them."""

from __future__ import annotations

from collections.abc import Iterator

from flora_train.data.chat.encoder import ChatEncoder
from flora_train.data.chat.messages import Conversation, Message

WORDS = ("alpha", "omega", "theta")
"""Contents of the probed conversation, which templates write as they are."""


def end_of_turn(encoder: ChatEncoder) -> tuple[frozenset[int], tuple[str, ...]]:
    """(special tokens, strings) that end a turn.

    Strings are what the template writes after the content and the tokenizer has no token for, or, where no
    special token follows either, what the next turn begins with. Both are empty for a template that separates
    turns by white space only, or cannot be probed.
    """
    try:
        document = encoder.document(_conversation(2), learn="last")
        learnt = [int(token) for begin, end in document.spans for token in document.tokens[begin:end]]
        tokens = frozenset(_special_at_the_end(encoder, learnt))
        written = encoder.tokenizer.decode(learnt, skip_special_tokens=True).partition(WORDS[1])[2].strip()
        if not tokens and not written:
            written = _next_beginning(encoder)
    except ValueError:  # the template accepts no such conversation
        return frozenset(), ()
    return tokens, (written,) if written else ()


def _special_at_the_end(encoder: ChatEncoder, learnt: list[int]) -> Iterator[int]:
    """The special tokens at the end of a learnt turn, with nothing but white space between them."""
    for token in reversed(learnt):
        if token in encoder.text.special:
            yield token
        elif encoder.tokenizer.decode([token]).strip():
            return


def _next_beginning(encoder: ChatEncoder) -> str:
    """What stands between the assistant's content and the next message; empty if that is white space."""
    text = encoder.template.render(_conversation(3)).text
    rest = text.partition(WORDS[1])[2]
    between, next_content, _ = rest.partition(WORDS[2])
    if not next_content or not between.strip():
        return ""
    return between.rstrip()


def _conversation(length: int) -> Conversation:
    roles = ("user", "assistant", "user")
    messages: list[Message] = [
        {"role": role, "content": word} for role, word in zip(roles, WORDS, strict=True)
    ]
    return Conversation(tuple(messages[:length]))
