"""IA3 for a batch of adapters: one scale per feature and adapter, with its reduction over tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.segments import Segments, check_stack


class SegmentedScale(torch.autograd.Function):
    """y = x * scale_k per segment. Shapes as `ia3_scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
        y = torch.empty_like(x)
        for k, start, end in segments:
            # Not cast first: near 1, bfloat16 cannot hold the small steps that training makes.
            torch.mul(x[start:end], scale[k], out=y[start:end])
        ctx.save_for_backward(x, scale)
        ctx.segments = segments
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        dx, dscale = torch.empty_like(x), torch.zeros_like(scale)
        for k, start, end in ctx.segments:
            torch.mul(dy[start:end], scale[k], out=dx[start:end])
            torch.sum(dy[start:end] * x[start:end], dim=0, dtype=scale.dtype, out=dscale[k])
        return dx, dscale, None


def ia3_scale(x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """x_t * scale_k for every token t of segment k (see `ia3_reference`).

    x: [T, d]; scale: [K, d] float32 masters; segments: K segments of T tokens. Returns [T, d] in x's dtype.
    Differentiable in x and scale, once. Raises ValueError on shapes that do not agree.
    """
    check_stack("x", x.shape, (segments.tokens, scale.shape[1]))
    check_stack("scale", scale.shape, (len(segments), x.shape[1]))
    return SegmentedScale.apply(x, scale, segments)
