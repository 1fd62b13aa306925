"""How does one new token of every row attend to what its row holds? On a CPU, with two small matmuls a head of keys.

torch's own attention on CPUs works on blocks of queries: with one query a row it spends most of a decoding step there.
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
    """query: [B, heads, 1, d]; key, value: [B, key heads, L, d], each for several heads; attention_mask: bool [B, 1, 1, L] or
    None. Returns [B, 1, heads, d]. Softmax in float32. More than one query a row goes to torch's own attention."""
    rows, heads, queries, width = query.shape
    if queries > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    groups = key.shape[1]
    scores = torch.matmul(query.view(rows, groups, heads // groups, width), key.transpose(2, 3)).float()
    scores.mul_(width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask, float("-inf"))
    out = torch.matmul(scores.softmax(-1).to(value.dtype), value)
    return out.view(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(NAME, one_query_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def decoding_attention(model: Any) -> Iterator[None]:
    """A model on the CPU that runs torch's attention runs ours meanwhile; others stay as they are."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    ours = on_cpu and getattr(model.config, "_attn_implementation", None) == "sdpa" and _lets_choose(model)
    if ours:
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        if ours:
            model.set_attn_implementation("sdpa")


def _lets_choose(model: Any) -> bool:
    """Whether the architecture takes its attention from transformers' table at all (Falcon and BLOOM do not)."""
    return bool(getattr(model, "_can_set_attn_implementation", lambda: False)())
