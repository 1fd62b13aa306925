"""Checks that prompts and their continuations fit into what the model can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flora_train.config.errors import user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.data.text_encoder import TextEncoder
from flora_train.models.context_length import apart_up_to, declared_positions, longest_readable

Prompts = tuple[Sequence[str], bool]
"""Texts, and whether special tokens that are written in them are tokens (in a recipe) or text (in problems)."""


def check_prompts(
    tokenizer: Any, prompts: Mapping[str, Prompts], rows: int, model: ModelConfig, model_config: Any, max_new_tokens: int
) -> None:
    """prompts: where they stand (a configuration key) -> texts; rows: token ids that the model knows.

    Raises UserError for a prompt without a token, with one that the model does not know, or without room for its continuation.
    """
    longest, encoder = 0, TextEncoder(tokenizer)
    for key, (texts, special_tokens) in prompts.items():
        for text in texts:
            ids = encoder.prompt(text, special_tokens)
            longest = max(longest, len(ids))
            if not ids:
                raise user_error(
                    key, text, "is no token, and the tokenizer puts none before a text: give the model something to begin with"
                )
            if max(ids) >= rows:
                token = tokenizer.convert_ids_to_tokens(max(ids))
                hint = f"holds the token {token!r} with the id {max(ids)}, and the model has the tokens 0 to {rows - 1}"
                raise user_error(key, text, hint)
    check_room(model_config, longest, max_new_tokens)
    limit = longest_readable(model, model_config, longest + max_new_tokens - 1) if longest else None
    if limit is not None:  # the last token is written, not read
        _refuse(limit + 1, longest, max_new_tokens)


def check_room(model_config: Any, longest: int, max_new_tokens: int) -> None:
    """Raises UserError if a prompt of `longest` tokens and its continuation are more than the model was made to read."""
    limit, apart = declared_positions(model_config), apart_up_to(model_config)
    if limit is not None and longest + max_new_tokens > limit:
        _refuse(limit, longest, max_new_tokens)
    if apart is not None and longest + max_new_tokens > apart:
        _refuse(apart, longest, max_new_tokens, "up to which a row's positions do not depend on its neighbours")


def _refuse(limit: int, longest: int, max_new_tokens: int, what: str = "that the model can read") -> None:
    rest = f"at most {limit - longest}" if longest < limit else "there is no room for it, whatever the length: leave it out"
    hint = f"with a prompt of {longest} tokens is more than the {limit} {what}: {rest}"
    raise user_error("evaluation.max_new_tokens", max_new_tokens, hint)
