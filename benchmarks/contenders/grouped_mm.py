"""fLoRA with W0 * M formed for all adapters and multiplied by torch.nn.functional.grouped_mm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class GroupedMatmulFlora(torch.autograd.Function):
    """y_k = x_k (W0 * B_k A_k)^T with hand-written gradients: three grouped matmuls for any rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, A, B, ends)
        return F.grouped_mm(x, _modulated(weight, A, B).mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, ends = ctx.saved_tensors
        dx = F.grouped_mm(dy, _modulated(weight, A, B), offs=ends)
        P = F.grouped_mm(dy.mT, x, offs=ends).mul_(weight)
        return (
            dx,
            None,
            torch.bmm(B.mT.to(P.dtype), P).to(A.dtype),
            torch.bmm(P, A.mT.to(P.dtype)).to(B.dtype),
            None,
        )


def _modulated(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return torch.bmm(B, A).to(weight.dtype).mul_(weight)


def grouped_mm_flora(problem: Any) -> Tensor:
    ends = torch.tensor(problem.segments.bounds[1:], dtype=torch.int32, device=problem.x.device)
    return GroupedMatmulFlora.apply(problem.x, problem.weight, problem.A, problem.B, ends)
