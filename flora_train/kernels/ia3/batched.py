"""IA3 in torch: one scale per feature and adapter, without a loop over adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import autocast_disabled
from flora_train.kernels.segments import Segments, expand_to_units, reduce_units, to_units


class SegmentedScale(torch.autograd.Function):
    """y = x * scale_k per segment. Shapes as `ia3_scale`."""

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
        dscale = torch.sum(to_units(dy * x, ctx.segments), dim=1, dtype=scale.dtype)
        return _scaled(dy, scale, ctx.segments), reduce_units(dscale, ctx.segments, scale.dtype), None


def _scaled(x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    # A tensor of its own and not a view, because a model may add to it in place.
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    # The scale is not cast first: near 1, bfloat16 cannot represent the small steps of training.
    scale_units = expand_to_units(scale, segments)[:, None]
    torch.mul(to_units(x.contiguous(), segments), scale_units, out=to_units(y, segments))
    return y
