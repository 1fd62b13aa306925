"""LoRA experts of one adapter on few tokens, as in decoding: each pair of a token and an expert gets its
expert's matrices, in as few operations as possible."""

from __future__ import annotations

import torch
from torch import Tensor

from flora_train.adapters.layer import AdapterLinear


def add_experts(
    base: Tensor, x: Tensor, stacks: dict[str, Tensor], experts: Tensor, scaling: float
) -> Tensor:
    """base + scaling B_e A_e x for every pair.

    base: [P, out]; x: [P, in], or [1, in] where all pairs have the same token; stacks: A [E, r, in] and B
    [E, out, r]; experts: int64 [P]. Returns [P, out].
    """
    A = stacks["A"].index_select(0, experts).to(x.dtype)
    B = stacks["B"].index_select(0, experts).to(x.dtype)
    hidden = torch.bmm(A, x.expand(len(experts), -1)[:, :, None])
    return torch.baddbmm(base[:, :, None], B, hidden, alpha=scaling)[:, :, 0]


def input_layer(
    layer: AdapterLinear, x: Tensor, stacks: dict[str, Tensor] | None, experts: Tensor, *, scaling: float
) -> Tensor:
    """[P, out] of a layer that reads the block's input: tokens x [T, in], k = P / T pairs each."""
    base = layer.base_layer(x)
    slots = len(experts) // len(x)
    if len(x) > 1:
        base, x = base.repeat_interleave(slots, dim=0), x.repeat_interleave(slots, dim=0)
    else:
        base = base.expand(slots, -1)
    return base if stacks is None else add_experts(base, x, stacks, experts, scaling)
