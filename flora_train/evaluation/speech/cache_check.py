"""Checks that a speech model gives the same logits with a cache as without one, before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from flora_train.config.errors import first_line, user_error
from flora_train.models.probe_inputs import plain_tokens, preserved_state, probe_inputs
from flora_train.models.speech_encoder import as_outputs, encode

ROWS, PROMPT, NEW = 2, 2, 2
CLOSE = {True: 1e-3, False: 0.15}
"""Relative difference of logits that is rounding, in float32 and in 16 bits."""


@torch.no_grad()
def check_transcribing(model: Any, features: Tensor | None) -> None:
    """Raises UserError for a model that the Transcriber would decode wrongly. features: [1, ...] of a clip. Collective where the base
    is divided."""
    inputs = probe_inputs(model, ROWS, PROMPT + NEW, features)
    if inputs is None:
        return
    name = type(model).__name__
    exact = next(model.parameters()).dtype not in (torch.bfloat16, torch.float16)
    try:
        with preserved_state(model):
            hidden = encode(model, inputs[model.main_input_name])
            difference = _difference(model, hidden, plain_tokens(model, ROWS * (PROMPT + NEW)).view(ROWS, -1))
    except Exception as error:
        words = f"cannot write a few tokens of a transcript with a cache: {type(error).__name__}: {first_line(error)}"
        raise user_error("model", name, words) from error
    if difference > CLOSE[exact]:
        raise user_error(
            "model",
            name,
            f"writes other transcripts with a cache than without ({difference:.0%} off): it cannot be evaluated here",
        )


def _difference(model: Any, hidden: Tensor, ids: Tensor) -> float:
    """Between logits of tokens read one after the other, and all at one time; relative."""
    whole = model(encoder_outputs=as_outputs(hidden), decoder_input_ids=ids, use_cache=False).logits[:, PROMPT - 1 :]
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    parts = []
    for start, end in ((0, PROMPT), *((place, place + 1) for place in range(PROMPT, PROMPT + NEW))):
        found = model(
            encoder_outputs=as_outputs(hidden), decoder_input_ids=ids[:, start:end], past_key_values=cache, use_cache=True
        )
        parts.append(found.logits[:, -1])
        cache.reorder_cache(torch.arange(ROWS, device=ids.device))
    mine, right = torch.stack(parts, 1).float(), whole.float()
    return float((mine - right).norm() / right.norm())
