"""Attention of one new token per row on a CPU, as two small matmuls for each head of keys.

PyTorch's CPU attention processes queries in blocks, and would take most of a decoding step with one query per
row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "flora_train_one_query"


def one_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in the interface of transformers' AttentionInterface; the softmax is computed in float32.

    query: [B, heads, 1, d]. key, value: [B, key heads, L, d], each shared by several heads. attention_mask:
    bool [B, 1, 1, L] or None. Returns [B, 1, heads, d]. More than one query per row is left to PyTorch's
    attention.
    """
    rows, heads, queries, width = query.shape
    if queries > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    groups = key.shape[1]
    scores = torch.matmul(query.view(rows, groups, heads // groups, width), key.transpose(2, 3)).float()
    if scaling is None:
        scaling = width**-0.5
    scores.mul_(scaling)
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask, float("-inf"))
    out = torch.matmul(scores.softmax(-1).to(value.dtype), value)
    return out.view(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(NAME, one_query_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def decoding_attention(model: Any) -> Iterator[None]:
    """Use `one_query_attention` in a model on the CPU that uses PyTorch's attention."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    replaceable = getattr(model.config, "_attn_implementation", None) == "sdpa" and _is_configurable(model)
    replaced = on_cpu and replaceable
    if replaced:
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        if replaced:
            model.set_attn_implementation("sdpa")


def _is_configurable(model: Any) -> bool:
    """Whether the architecture uses transformers' AttentionInterface (Falcon and BLOOM do not)."""
    return bool(getattr(model, "_can_set_attn_implementation", lambda: False)())
