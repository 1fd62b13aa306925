"""Limits on the token ids and the lengths that a model can read, from its shape, before it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from flora_train.config.model_schema import ModelConfig
from flora_train.models.loading import zero_model

SHORT = 8
"""Tokens that every model can read."""
MARGIN = 8
"""Positions that a table may keep for itself (OPT and RoBERTa begin at 2 and later): a text that is that much shorter than what the
configuration says is not tried."""


def declared_positions(model_config: Any) -> int | None:
    """Tokens that the configuration says the model was made for; None where it says nothing (ALiBi, state-space models)."""
    text = model_config.get_text_config(decoder=True)
    for part in (text, model_config):
        for key in ("max_target_positions", "max_position_embeddings", "n_positions", "max_seq_len"):
            value = getattr(part, key, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


STATIC_ROPE = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
"""Kinds of rotary positions that are the same whatever stands beside a row."""


def apart_up_to(model_config: Any) -> int | None:
    """Tokens of the longest row of a batch up to which the positions of all its rows are as if each were alone; None where they always
    are. Beyond it, rotary positions of some kinds (longrope, dynamic) are computed anew for the whole batch."""
    found: list[int] = []
    for part in {id(part): part for part in (model_config.get_text_config(decoder=True), model_config)}.values():
        for rope in _ropes(part):
            if rope.get("rope_type", rope.get("type", "default")) not in STATIC_ROPE:
                original = getattr(part, "original_max_position_embeddings", None)
                limits = (rope.get("original_max_position_embeddings"), original, getattr(part, "max_position_embeddings", None))
                found += [limit for limit in limits if isinstance(limit, int) and limit > 0][:1]
    return min(found, default=None)


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """What a configuration says of rotary positions: for all layers, or for each kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        value = getattr(config, key, None)
        if isinstance(value, Mapping):
            yield value
            yield from (inner for inner in value.values() if isinstance(inner, Mapping))


def longest_readable(config: ModelConfig, model_config: Any, wanted: int) -> int | None:
    """The most tokens that the model can read at all, where these are fewer than `wanted`; None where it reads `wanted`, or where
    that cannot be found out. Models with rotary positions read any number.

    Tried on one layer with zeros for numbers: an embedding of positions, learnt or not, ends where its table ends.
    """
    declared = declared_positions(model_config)
    if getattr(model_config, "is_encoder_decoder", False) or (declared is not None and wanted <= declared - MARGIN):
        return None
    try:
        model = zero_model(config, layers=1)
    except Exception:  # a configuration that cannot be cut to one layer
        return None

    def reads(length: int) -> bool:
        return _reads(model, length)

    if reads(wanted) or not reads(SHORT):
        return None
    for likely in (declared,) if declared is not None else ():
        if SHORT < likely < wanted and reads(likely) and not reads(likely + 1):
            return likely
    return _bisect(reads, SHORT, wanted)


def _bisect(reads: Callable[[int], bool], short: int, long: int) -> int:
    """The most tokens that are read, of `short`, which are, and `long`, which are not."""
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (middle, long) if reads(middle) else (short, middle)
    return short


class _Read(Exception):
    """The layers have read their tokens."""


@torch.no_grad()
def _reads(model: Any, length: int) -> bool:
    def stop(module: nn.Module, args: Any) -> None:
        raise _Read

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(stop)
    ids = torch.full((1, length), _token(model))
    try:
        model.eval()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except _Read:
        return True
    except Exception:
        return False
    finally:
        if handle is not None:
            handle.remove()
    return True


def _token(model: Any) -> int:
    """Some token that is not padding: positions of some models skip that."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 1 if padding == 0 else 0
