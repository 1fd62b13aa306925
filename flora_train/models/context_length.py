"""Limits of the lengths that a model can read, determined from its shape before it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from flora_train.config.model_schema import ModelConfig
from flora_train.models.loading import unique_parts, zero_model

MIN_LENGTH = 8
"""Tokens that every model can read."""
RESERVED_POSITIONS = 8
"""Positions that a table may reserve (OPT and RoBERTa begin at 2 or later). Texts that are shorter than the
declared length by at least this are not checked."""

STATIC_ROPE = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
"""Types of rotary positions that do not depend on the other rows of a batch."""


def declared_positions(model_config: Any) -> int | None:
    """The number of positions in the configuration; None if it has none (ALiBi, state-space models)."""
    text = model_config.get_text_config(decoder=True)
    for part in (text, model_config):
        for key in ("max_target_positions", "max_position_embeddings", "n_positions", "max_seq_len"):
            value = getattr(part, key, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def independent_up_to(model_config: Any) -> int | None:
    """The longest row of a batch up to which positions do not depend on the other rows; None if they never
    do.

    Beyond it, rotary positions of some types (longrope, dynamic) are computed for the whole batch.
    """
    lengths: list[int] = []
    text = model_config.get_text_config(decoder=True)
    for part in unique_parts(text, model_config):
        for rope in _ropes(part):
            if rope.get("rope_type", rope.get("type", "default")) not in STATIC_ROPE:
                original = getattr(part, "original_max_position_embeddings", None)
                declared = getattr(part, "max_position_embeddings", None)
                candidates = (rope.get("original_max_position_embeddings"), original, declared)
                lengths += [length for length in candidates if isinstance(length, int) and length > 0][:1]
    return min(lengths, default=None)


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of rotary positions: for all layers, or for each type of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        value = getattr(config, key, None)
        if isinstance(value, Mapping):
            yield value
            yield from (inner for inner in value.values() if isinstance(inner, Mapping))


def max_readable_length(config: ModelConfig, model_config: Any, length: int) -> int | None:
    """The most tokens that the model can read, if that is less than `length`; None if it reads `length`, or
    if that is unknown.

    Determined on one layer with weights of 0: position embeddings end where their table ends. Models with
    rotary positions read any length.
    """
    declared = declared_positions(model_config)
    if getattr(model_config, "is_encoder_decoder", False):
        return None
    if declared is not None and length <= declared - RESERVED_POSITIONS:
        return None
    try:
        model = zero_model(config, layers=1)
    except Exception:  # the configuration cannot be reduced to one layer
        return None

    def reads(tokens: int) -> bool:
        return _reads(model, tokens)

    if reads(length) or not reads(MIN_LENGTH):
        return None
    if (
        declared is not None
        and MIN_LENGTH < declared < length
        and reads(declared)
        and not reads(declared + 1)
    ):
        return declared
    return _bisect(reads, MIN_LENGTH, length)


def _bisect(reads: Callable[[int], bool], short: int, long: int) -> int:
    """The largest length that is read, between `short`, which is, and `long`, which is not."""
    while long - short > 1:
        middle = (short + long) // 2
        if reads(middle):
            short = middle
        else:
            long = middle
    return short


class _ReadAll(Exception):
    """The layers have read their tokens."""


@torch.no_grad()
def _reads(model: Any, length: int) -> bool:
    def stop(module: nn.Module, args: Any) -> None:
        raise _ReadAll

    # Stops before the output head, which needs most of the time.
    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(stop)
    ids = torch.full((1, length), _token(model))
    try:
        model.eval()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except _ReadAll:
        return True
    except Exception:
        return False
    finally:
        if handle is not None:
            handle.remove()
    return True


def _token(model: Any) -> int:
    """A token that is not padding, which has no position in some models."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return int(padding == 0)
