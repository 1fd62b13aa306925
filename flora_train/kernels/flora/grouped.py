"""fLoRA as batched matmuls over adapters: W0 * M of all adapters at once.

There is no loop over adapters and no wait for the device, at the price of [K, out, in] numbers that exist at
the same time. Segments of different lengths are padded to the longest. Used on a GPU without the Triton
kernels, and for small weights on a CPU, where a loop over adapters costs more than it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import autocast_disabled
from flora_train.kernels.flora.materialised import near_one
from flora_train.kernels.segments import Segments, per_segment


class GroupedFlora(torch.autograd.Function):
    """y = x (W0 * M_k)^T per segment. Shapes and dtypes as `flora_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        offset: Sequence[float],
        segments: Segments,
        split: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.offset, ctx.segments = offset, segments
        grouped = _grouped(x, segments)
        near = near_one(A, B, per_segment(offset, B).view(-1))[:, None, None].to(B.dtype)
        deviation = torch.bmm(B, A).add_(per_segment(offset, B) - near).to(weight.dtype).mul_(weight)
        base = weight.expand_as(deviation)
        # Without a check on a GPU, because reading `near` would wait for it.
        if near.is_cuda or not near.all():
            base = base * near.to(weight.dtype)
        if split:
            # The sum of x W0^T and x (W0 * (M - 1))^T, rounded once: half precision loses M near 1
            # (materialised.py).
            pair = torch.cat([base, deviation], dim=2)
            return _batched_matmul(torch.cat([grouped, grouped], dim=2), pair.mT, segments)
        return _batched_matmul(grouped, deviation.add_(base).mT, segments)

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        grouped, dgrouped = _grouped(x, ctx.segments), _grouped(dy, ctx.segments)
        dx = None
        if ctx.needs_input_grad[0]:
            modulated = torch.bmm(B, A).add_(per_segment(ctx.offset, B)).to(weight.dtype).mul_(weight)
            dx = _batched_matmul(dgrouped, modulated, ctx.segments)
        # P = W0 * (dY^T X); dB = P A^T; dA = B^T P
        P = torch.bmm(dgrouped.mT, grouped).mul_(weight)
        dA = torch.bmm(B.mT.to(P.dtype), P).to(A.dtype)
        # Transposed, because a matmul with few rows is faster than one with few columns.
        dB = torch.bmm(A.to(P.dtype), P.mT).to(B.dtype).mT
        return dx, None, dA, dB, None, None, None


def _grouped(tokens: Tensor, segments: Segments) -> Tensor:
    """[T, d] -> [K, longest, d], zeros after the end of shorter segments."""
    if segments.even:
        return tokens.view(len(segments), -1, tokens.shape[1])
    token_of_slot, _ = _padding_index(segments, tokens.device)
    padded = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
    return padded[token_of_slot].view(len(segments), -1, tokens.shape[1])


def _batched_matmul(grouped: Tensor, weights: Tensor, segments: Segments) -> Tensor:
    """[K, longest, d] by [K, d, d'] -> [T, d']."""
    if not segments.even:
        _, slot_of_token = _padding_index(segments, grouped.device)
        return torch.bmm(grouped, weights).flatten(0, 1)[slot_of_token]
    # A tensor of its own and not a view, because a model may add to it in place.
    y = grouped.new_empty(segments.tokens, weights.shape[2])
    torch.bmm(grouped, weights, out=y.view(len(segments), -1, weights.shape[2]))
    return y


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for training steps, too
def _padding_index(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor]:
    """The token of each of the K * longest slots (T for padding), and the slot of each token."""
    longest = max(segments.lengths)
    token_of_slot: list[int] = []
    slot_of_token: list[int] = []
    for k, length in enumerate(segments.lengths):
        start = segments.bounds[k]
        token_of_slot += [*range(start, start + length), *[segments.tokens] * (longest - length)]
        slot_of_token += range(k * longest, k * longest + length)
    return torch.tensor(token_of_slot, device=device), torch.tensor(slot_of_token, device=device)
