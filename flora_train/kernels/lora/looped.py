"""LoRA in torch, one segment after the other: for segments of many tokens whose lengths have no common
divisor, such as the tokens of experts, which `SegmentedLora` would have to treat one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import autocast_disabled
from flora_train.kernels.segments import Segments


class LoopedLora(torch.autograd.Function):
    """y += scaling_k (x A_k^T) B_k^T, in place. Shapes as `lora_add`."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Sequence[float], segments: Segments
    ) -> Tensor:
        ctx.mark_dirty(y)
        hidden = LoopedLora.add(y, x, A, B, scaling, segments)
        ctx.save_for_backward(x, A, B, hidden)
        ctx.scaling, ctx.segments = scaling, segments
        return y

    @staticmethod
    def add(
        y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Sequence[float], segments: Segments
    ) -> Tensor:
        """Add to y without autograd. Returns scaling_k x A_k^T, [T, r]."""
        hidden = x.new_empty(x.shape[0], A.shape[1])
        own_A, own_B = A.to(x.dtype), B.to(x.dtype)
        for k, start, end in segments:
            tokens = torch.mm(x[start:end], own_A[k].T, out=hidden[start:end]).mul_(scaling[k])
            y[start:end].addmm_(tokens, own_B[k].T)
        return hidden

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, hidden = ctx.saved_tensors
        own_A, own_B = A.to(x.dtype), B.to(x.dtype)
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        dA, dB = torch.zeros_like(A), torch.zeros_like(B)
        for k, start, end in ctx.segments:
            dtokens = dy[start:end]
            dhidden = torch.mm(dtokens, own_B[k]).mul_(ctx.scaling[k])
            if dx is not None:
                torch.mm(dhidden, own_A[k], out=dx[start:end])
            dA[k] = dhidden.T @ x[start:end]
            # Transposed, because a matmul with few rows is faster than one with few columns.
            dB[k] = (hidden[start:end].T @ dtokens).T
        return dy, dx, dA, dB, None, None
