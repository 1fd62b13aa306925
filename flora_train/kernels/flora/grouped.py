"""fLoRA in batched matmuls over the adapters: every adapter's W0 * M at once.

No loop over adapters and no wait for the device, at the price of [K, out, in] numbers that exist at one time. Segments of
different lengths are padded to the longest. For a GPU without kernels of our own, and for small weights on a CPU, where a
loop over adapters costs more than it computes.
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
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, offset: Sequence[float], segments: Segments, split: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.offset, ctx.segments = offset, segments
        grouped = _grouped(x, segments)
        near = near_one(A, B, per_segment(offset, B).view(-1))[:, None, None].to(B.dtype)
        deviation = torch.bmm(B, A).add_(per_segment(offset, B) - near).to(weight.dtype).mul_(weight)
        base = weight.expand_as(deviation)
        if near.is_cuda or not near.all():  # a GPU is not waited for
            base = base * near.to(weight.dtype)
        if split:
            # the sum of x W0^T and x (W0 * (M - 1))^T, rounded once: half precision loses M near 1 (flora_torch.py)
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
        P = torch.bmm(dgrouped.mT, grouped).mul_(weight)  # W0 * (dY^T X); dB = P A^T; dA = B^T P
        dA = torch.bmm(B.mT.to(P.dtype), P).to(A.dtype)
        dB = torch.bmm(A.to(P.dtype), P.mT).to(B.dtype).mT  # a thin matmul is faster lying down
        return dx, None, dA, dB, None, None, None


def _grouped(tokens: Tensor, segments: Segments) -> Tensor:
    """[T, d] -> [K, longest, d], zeros after the end of shorter segments."""
    if segments.even:
        return tokens.view(len(segments), -1, tokens.shape[1])
    there, _ = _places(segments, tokens.device)
    padded = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
    return padded[there].view(len(segments), -1, tokens.shape[1])


def _batched_matmul(grouped: Tensor, weights: Tensor, segments: Segments) -> Tensor:
    """[K, longest, d] by [K, d, d'] -> [T, d']."""
    if not segments.even:
        return torch.bmm(grouped, weights).flatten(0, 1)[_places(segments, grouped.device)[1]]
    y = grouped.new_empty(segments.tokens, weights.shape[2])  # not a view of something: a model may add to it in place
    torch.bmm(grouped, weights, out=y.view(len(segments), -1, weights.shape[2]))
    return y


@lru_cache(maxsize=256)
def _places(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which token stands at each place of the groups (T: none), and at which place each token stands."""
    longest = max(segments.lengths)
    there = [
        start + i if i < n else segments.tokens
        for start, n in zip(segments.bounds, segments.lengths, strict=False)
        for i in range(longest)
    ]
    back = [k * longest + i for k, n in enumerate(segments.lengths) for i in range(n)]
    return torch.tensor(there, device=device), torch.tensor(back, device=device)
