"""LoRA experts on few tokens, as in decoding: each pair of a token and an expert gets its expert's matrices,
in as few operations as possible. Without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from flora_train.adapters.routed.choice import Choice
from flora_train.adapters.routing import Routing

FEW_PAIRS = 32
"""Pairs up to which, without gradients, each gets its expert's parameters instead of being sorted by
expert."""
VECTOR_PAIRS = 4
"""Pairs up to which, on a CPU, products of a matrix and a vector are faster than batched ones."""


def is_few(choice: Choice, routing: Routing) -> bool:
    """Whether this is inference with so few pairs that each gets its expert's parameters.

    Reentrant checkpointing runs the first forward of a training step without gradients, too: with noise,
    draws or goals it is no inference.
    """
    if torch.is_grad_enabled() or choice.experts.numel() > FEW_PAIRS:
        return False
    return routing.noise is None and routing.draws is None and routing.goals is None


def add_experts(
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, experts: Tensor, weights: Tensor | None = None
) -> Tensor:
    """base + sum_e w_e B_e A_e x for every token.

    Args:
        base: [T, out], contiguous. It is changed where that is faster.
        x: [T, in], or [1, in] where all tokens are the same.
        A: [E, r, in].
        B: [E, out, r].
        experts: int64 [T, k], none of them UNUSED.
        weights: float32 [T, k], scaling included. Default: 1.

    Returns:
        [T, out].
    """
    x = x.to(base.dtype)
    if base.device.type == "cpu" and experts.numel() <= VECTOR_PAIRS:
        _add_vectors(base, x.expand(len(base), -1), A, B, experts=experts, weights=weights)
        return base
    hidden = torch.mm(x, A.flatten(0, 1).to(x.dtype).T).view(-1, *A.shape[:2])
    weighted = hidden * shares(experts, len(A), hidden.dtype, weights)[:, :, None]
    return base + torch.bmm(weighted.transpose(0, 1), B.to(x.dtype).mT).sum(0)


def add_experts_of_pairs(
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """base + sum_e w_e B_e A_e x_e for every token, whose experts each read a vector of their own.

    Args: as of `add_experts`, but x: [T k, in].
    """
    tokens, slots = experts.shape
    x = x.to(base.dtype)
    if base.device.type == "cpu" and experts.numel() <= VECTOR_PAIRS:
        vectors = x.reshape(tokens, slots, -1)
        for slot in range(slots):
            part = {"experts": experts[:, slot, None], "weights": weights[:, slot, None]}
            _add_vectors(base, vectors[:, slot], A, B, **part)
        return base
    hidden = torch.mm(x, A.flatten(0, 1).to(x.dtype).T).view(len(x), *A.shape[:2])
    of_pairs = shares(experts.reshape(-1, 1), len(A), hidden.dtype, weights.reshape(-1, 1))
    weighted = (hidden * of_pairs[:, :, None]).view(tokens, slots, *A.shape[:2]).sum(1)
    return base + torch.bmm(weighted.transpose(0, 1), B.to(x.dtype).mT).sum(0)


def shares(experts: Tensor, count: int, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
    """[T, E]: the weight of every expert for a token, 0 for those that it is not sent to.

    An expert may be named twice: a slot that is not used names some expert, with weight 0.
    """
    values = torch.ones_like(experts, dtype=dtype) if weights is None else weights.to(dtype)
    return values.new_zeros(len(experts), count).scatter_add_(1, experts, values)


def _add_vectors(
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, *, experts: Tensor, weights: Tensor | None
) -> None:
    """`add_experts` for few pairs, in place."""
    factors = [[1.0] * experts.shape[1]] * len(experts) if weights is None else weights.tolist()
    for row, token, own, own_factors in zip(base, x, experts.tolist(), factors, strict=True):
        for expert, factor in zip(own, own_factors, strict=True):
            hidden = torch.mv(A[expert].to(row.dtype), token)
            row.addmv_(B[expert].to(row.dtype), hidden, alpha=factor)
