"""LoRA in torch: the update accumulates into the base output, without a [T, out] tensor of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.segments import Segments


class SegmentedLora(torch.autograd.Function):
    """y += scaling_k (x A_k^T) B_k^T, in place. Shapes as `lora_add`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Sequence[float], segments: Segments) -> Tensor:
        ctx.mark_dirty(y)
        A, B = A.to(x.dtype), B.to(x.dtype)
        hidden = x.new_empty(x.shape[0], A.shape[1])
        for k, start, end in segments:
            torch.mm(x[start:end], A[k].T, out=hidden[start:end])
            y[start:end].addmm_(hidden[start:end], B[k].T, alpha=scaling[k])
        ctx.save_for_backward(x, A, B, hidden)
        ctx.scaling, ctx.segments = scaling, segments
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, hidden = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        dA, dB = torch.zeros_like(A), torch.zeros_like(B)
        for k, start, end in ctx.segments:
            dhidden = (dy[start:end] @ B[k]).mul_(ctx.scaling[k])
            if dx is not None:
                torch.mm(dhidden, A[k], out=dx[start:end])
            torch.mm(dhidden.T, x[start:end], out=dA[k])
            torch.mm(dy[start:end].T, hidden[start:end], out=dB[k]).mul_(ctx.scaling[k])
        return dy, dx, dA, dB, None, None
