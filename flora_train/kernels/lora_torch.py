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

from flora_train.kernels.segments import Segments, per_row, segment_of_rows


class SegmentedLora(torch.autograd.Function):
    """y += scaling_k (x A_k^T) B_k^T, in place. Shapes as `lora_add`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Sequence[float], segments: Segments) -> Tensor:
        ctx.mark_dirty(y)
        owner, unit = segment_of_rows(segments, x.device), segments.unit
        rows = x.view(-1, unit, x.shape[1])
        hidden = torch.bmm(rows, A.to(x.dtype)[owner].mT).mul_(per_row(scaling, segments, x))  # [rows, unit, r]
        y.view(-1, unit, y.shape[1]).baddbmm_(hidden, B.to(x.dtype)[owner].mT)
        ctx.save_for_backward(x, A, B, hidden)
        ctx.scaling, ctx.segments = scaling, segments
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, hidden = ctx.saved_tensors
        owner, unit = segment_of_rows(ctx.segments, x.device), ctx.segments.unit
        rows, drows = x.view(-1, unit, x.shape[1]), dy.reshape(-1, unit, dy.shape[1])
        dhidden = torch.bmm(drows, B.to(x.dtype)[owner]).mul_(per_row(ctx.scaling, ctx.segments, x))
        dx = torch.bmm(dhidden, A.to(x.dtype)[owner]).view_as(x) if ctx.needs_input_grad[1] else None
        dA = torch.zeros_like(A).index_add_(0, owner, torch.bmm(dhidden.mT, rows).to(A.dtype))
        dB = torch.zeros_like(B).index_add_(0, owner, torch.bmm(drows.mT, hidden).to(B.dtype))
        return dy, dx, dA, dB, None, None
