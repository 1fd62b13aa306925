"""Checks that prompts and their continuations fit into what the model can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flora_train.config.errors import UserError, user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.data.text_encoder import TextEncoder
from flora_train.models.context_length import declared_positions, independent_up_to, max_readable_length

Prompts = tuple[Sequence[str | tuple[int, ...]], bool]
"""Texts or token ids, and whether special tokens written in texts are tokens (in a recipe) or text (in
problems)."""
MAX_NEW_TOKENS = "evaluation.max_new_tokens"


def check_prompts(
    tokenizer: Any,
    prompts: Mapping[str, Prompts],
    *,
    vocabulary: int,
    model: ModelConfig,
    model_config: Any,
    max_new_tokens: int,
    key: str = MAX_NEW_TOKENS,
) -> None:
    """Raises UserError for a prompt without tokens, with unknown tokens, or without room for its
    continuation.

    prompts: configuration key -> texts. vocabulary: number of token ids that the model has embeddings of.
    key: the key of max_new_tokens.
    """
    longest, encoder = 0, TextEncoder(tokenizer)
    for key_of_texts, (texts, special_tokens) in prompts.items():
        for text in texts:
            shown: str | None = None
            if isinstance(text, str):
                shown, ids = text, encoder.prompt(text, special_tokens)
            else:
                ids = list(text)
            longest = max(longest, len(ids))
            if not ids:
                hint = (
                    "has no tokens, and the tokenizer adds no start token: give the model a text to begin "
                    "with"
                )
                raise user_error(key_of_texts, shown, hint)
            if max(ids) >= vocabulary:
                token = tokenizer.convert_ids_to_tokens(max(ids))
                hint = (
                    f"has the token {token!r} with the id {max(ids)}, but the model's tokens are 0 to "
                    f"{vocabulary - 1}"
                )
                raise user_error(key_of_texts, shown, hint)
    check_room(model_config, longest, max_new_tokens, key)
    if not longest:
        return
    limit = max_readable_length(model, model_config, longest + max_new_tokens - 1)
    if limit is not None:  # the last token is generated, not read
        raise _too_long(limit + 1, longest, max_new_tokens, key)


def context_length(model: ModelConfig, model_config: Any) -> int | None:
    """The most tokens that a row of a batch can have; None if there is no limit."""
    declared, independent = declared_positions(model_config), independent_up_to(model_config)
    readable = None
    if declared is not None:
        readable = max_readable_length(model, model_config, declared)
    return min((limit for limit in (declared, independent, readable) if limit is not None), default=None)


def check_room(model_config: Any, longest: int, max_new_tokens: int, key: str = MAX_NEW_TOKENS) -> None:
    """Raises UserError if a prompt of `longest` tokens and its continuation exceed the model's context
    length. key: that of max_new_tokens.
    """
    limit, independent_limit = declared_positions(model_config), independent_up_to(model_config)
    if limit is not None and longest + max_new_tokens > limit:
        raise _too_long(limit, longest, max_new_tokens, key)
    if independent_limit is not None and longest + max_new_tokens > independent_limit:
        meaning = "up to which a row's positions do not depend on its neighbours"
        raise _too_long(independent_limit, longest, max_new_tokens, key, meaning=meaning)


def _too_long(
    limit: int, longest: int, max_new_tokens: int, key: str, *, meaning: str = "that the model can read"
) -> UserError:
    allowed = f"give at most {limit - longest}"
    if longest >= limit:
        allowed = "no continuation fits, whatever its length: remove the prompt"
    hint = f"with a prompt of {longest} tokens is more than the {limit} {meaning}: {allowed}"
    return user_error(key, max_new_tokens, hint)
