"""Checks that a speech model gives the same logits with a cache as without one, before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from flora_train.config.errors import first_line, user_error
from flora_train.models.probe_inputs import plain_tokens, preserved_state, probe_inputs
from flora_train.models.speech_encoder import as_encoder_outputs, encode

ROWS, PROMPT_TOKENS, NEW_TOKENS = 2, 2, 2
MAX_DIFFERENCE = {True: 1e-3, False: 0.15}
"""Relative difference of logits attributed to rounding, in float32 (True) and 16 bits (False)."""


@torch.no_grad()
def check_transcribing(model: Any, features: Tensor | None) -> None:
    """Raises UserError for a model that the Transcriber would decode wrongly.

    features: [1, ...] of a clip. All processes must call this if the base model is sharded.
    """
    inputs = probe_inputs(model, ROWS, PROMPT_TOKENS + NEW_TOKENS, features)
    if inputs is None:
        return
    name = type(model).__name__
    exact = next(model.parameters()).dtype not in (torch.bfloat16, torch.float16)
    try:
        with preserved_state(model):
            hidden = encode(model, inputs[model.main_input_name])
            difference = _difference(
                model, hidden, plain_tokens(model, ROWS * (PROMPT_TOKENS + NEW_TOKENS)).view(ROWS, -1)
            )
    except Exception as error:
        hint = f"fails to decode a few tokens with a cache: {type(error).__name__}: {first_line(error)}"
        raise user_error("model", name, hint) from error
    if difference > MAX_DIFFERENCE[exact]:
        hint = (
            f"writes different transcripts with a cache than without ({difference:.0%} off): it cannot be "
            f"evaluated"
        )
        raise user_error("model", name, hint)


def _difference(model: Any, hidden: Tensor, ids: Tensor) -> float:
    """Relative difference between logits of tokens read one by one with a cache, and all at once."""
    encoded = as_encoder_outputs(hidden)
    full = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits[
        :, PROMPT_TOKENS - 1 :
    ]
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    ends = range(PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS + 1)
    steps = []
    start = 0
    for end in ends:
        tokens = ids[:, start:end]
        output = model(
            encoder_outputs=encoded, decoder_input_ids=tokens, past_key_values=cache, use_cache=True
        )
        steps.append(output.logits[:, -1])
        cache.reorder_cache(torch.arange(ROWS, device=ids.device))
        start = end
    cached, expected = torch.stack(steps, 1).float(), full.float()
    return float((cached - expected).norm() / expected.norm())
