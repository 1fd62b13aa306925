"""LoRA in torch: all adapters of a batch in two batched matmuls, without a loop over adapters.

The tokens are viewed as units of `segments.unit` tokens that share an adapter, so that segments of different
lengths need no padding. The update accumulates into the base output, without a [T, out] tensor of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import autocast_disabled
from flora_train.kernels.segments import Segments, expand_to_units, per_unit, reduce_units, to_units


class SegmentedLora(torch.autograd.Function):
    """y += scaling_k (x A_k^T) B_k^T, in place. Shapes as `lora_add`."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Sequence[float], segments: Segments
    ) -> Tensor:
        ctx.mark_dirty(y)
        hidden = SegmentedLora.add(y, x, A, B, scaling, segments)
        ctx.save_for_backward(x, A, B, hidden)
        ctx.scaling, ctx.segments = scaling, segments
        return y

    @staticmethod
    def add(
        y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Sequence[float], segments: Segments
    ) -> Tensor:
        """Add to y without autograd. Returns scaling_k x A_k^T, [U, unit, r]."""
        units = to_units(x, segments)
        A_units = expand_to_units(A.to(x.dtype), segments)
        hidden = torch.bmm(units, A_units.mT).mul_(per_unit(scaling, segments, x))
        to_units(y, segments).baddbmm_(hidden, _transposed(B, x, segments))
        return hidden

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, hidden = ctx.saved_tensors
        segments = ctx.segments
        units, dunits = to_units(x, segments), to_units(dy.contiguous(), segments)
        dhidden = torch.bmm(dunits, _transposed(B, x, segments).mT).mul_(per_unit(ctx.scaling, segments, x))
        dx = None
        if ctx.needs_input_grad[1]:
            dx = torch.bmm(dhidden, expand_to_units(A.to(x.dtype), segments)).view_as(x)
        dA = reduce_units(torch.bmm(dhidden.mT, units), segments, A.dtype)
        dB = reduce_units(torch.bmm(hidden.mT, dunits), segments, B.dtype).mT
        return dy, dx, dA, dB, None, None


def _transposed(B: Tensor, x: Tensor, segments: Segments) -> Tensor:
    """[K, out, r] -> [U, r, out]: a matmul with few columns is several times slower than one with few
    rows."""
    return expand_to_units(B.mT.to(x.dtype, memory_format=torch.contiguous_format), segments)
