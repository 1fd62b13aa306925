"""LoRA in torch: all adapters of a batch in two batched matmuls, without a loop over them.

The tokens are seen as rows of `segments.unit` tokens that share an adapter, so that segments of different lengths need
no padding. The update accumulates into the base output, without a [T, out] tensor of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import autocast_disabled
from flora_train.kernels.segments import Segments, from_rows, in_rows, per_row, to_rows


class SegmentedLora(torch.autograd.Function):
    """y += scaling_k (x A_k^T) B_k^T, in place. Shapes as `lora_add`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Sequence[float], segments: Segments) -> Tensor:
        ctx.mark_dirty(y)
        rows = in_rows(x, segments)
        hidden = torch.bmm(rows, to_rows(A.to(x.dtype), segments).mT).mul_(per_row(scaling, segments, x))  # [rows, unit, r]
        in_rows(y, segments).baddbmm_(hidden, _lying(B, x, segments))
        ctx.save_for_backward(x, A, B, hidden)
        ctx.scaling, ctx.segments = scaling, segments
        return y

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, hidden = ctx.saved_tensors
        segments = ctx.segments
        rows, drows = in_rows(x, segments), in_rows(dy.contiguous(), segments)
        dhidden = torch.bmm(drows, _lying(B, x, segments).mT).mul_(per_row(ctx.scaling, segments, x))
        dx = torch.bmm(dhidden, to_rows(A.to(x.dtype), segments)).view_as(x) if ctx.needs_input_grad[1] else None
        dA = from_rows(torch.bmm(dhidden.mT, rows), segments, A.dtype)
        dB = from_rows(torch.bmm(hidden.mT, drows), segments, B.dtype).mT
        return dy, dx, dA, dB, None, None


def _lying(B: Tensor, x: Tensor, segments: Segments) -> Tensor:
    """[K, out, r] -> [rows, r, out]: a matmul with few columns is several times slower than one with few rows."""
    return to_rows(B.mT.to(x.dtype, memory_format=torch.contiguous_format), segments)
