"""IA3 in torch: one scale per feature and adapter, with its reduction over tokens, without a loop over adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import autocast_disabled
from flora_train.kernels.segments import Segments, from_rows, in_rows, to_rows


class SegmentedScale(torch.autograd.Function):
    """y = x * scale_k per segment, without a loop over them. Shapes as `ia3_scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.segments = segments
        return _scaled(x, scale, segments)

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        dscale = torch.sum(in_rows(dy * x, ctx.segments), dim=1, dtype=scale.dtype)
        return _scaled(dy, scale, ctx.segments), from_rows(dscale, ctx.segments, scale.dtype), None


def _scaled(x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    # The scale is not cast first: near 1, bfloat16 cannot hold the small steps that training makes.
    torch.mul(in_rows(x.contiguous(), segments), to_rows(scale, segments)[:, None], out=in_rows(y, segments))
    return y  # not a view of something: a model may add to it in place
