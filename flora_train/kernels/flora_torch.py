"""fLoRA in torch: two formulations with hand-written gradients (docs/math.md derives both).

Materialise forms W0 * M of one segment at a time in a scratch buffer; all ranks' gradients come from one
dY^T X per segment, so the cost does not grow with the rank. Rank expansion runs r scaled copies of the tokens
through W0, which reads W0 once for all adapters: right for few tokens or rank 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.segments import Segments


class MaterialisedFlora(torch.autograd.Function):
    """y = x (W0 * M_k)^T per segment. Shapes and dtypes as `flora_linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, offset: Sequence[float], segments: Segments) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.offset, ctx.segments = offset, segments
        y = x.new_empty(x.shape[0], weight.shape[0])
        if _is_half(weight):
            # bfloat16(W0 * M) loses every modulation below 0.3 %. [x x] [W0 D]^T with D = W0 * (M - 1) keeps it: the sum
            # of both terms is rounded once, after the matmul's float32 accumulation.
            twice = torch.cat([x, x], dim=1)
            pair = torch.cat([weight, weight], dim=1)
            for k, start, end in segments:
                _deviation(weight, A[k], B[k], offset[k], out=pair[:, weight.shape[1] :])
                torch.mm(twice[start:end], pair.T, out=y[start:end])
        else:
            scratch = torch.empty_like(weight)
            for k, start, end in segments:
                torch.mm(x[start:end], _modulate(weight, A[k], B[k], offset[k], scratch).T, out=y[start:end])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        need_dx, need_dAB = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        dy = dy.contiguous()
        dx = torch.empty_like(x) if need_dx else None
        dA, dB = (torch.zeros_like(A), torch.zeros_like(B)) if need_dAB else (None, None)
        scratch = torch.empty_like(weight)
        for k, start, end in ctx.segments:
            dy_k, x_k = dy[start:end], x[start:end]
            if dx is not None:
                torch.mm(dy_k, _modulate(weight, A[k], B[k], ctx.offset[k], scratch), out=dx[start:end])
            if dA is not None and dB is not None:
                # P = W0 * (dY^T X); dB = P A^T; dA = B^T P: one matmul over tokens whatever the rank.
                P = torch.mm(dy_k.T, x_k, out=scratch).mul_(weight)
                dB[k] = P @ A[k].T.to(P.dtype)
                dA[k] = B[k].T.to(P.dtype) @ P
        return dx, None, dA, dB, None, None


class RankExpandedFlora(torch.autograd.Function):
    """y = offset_k x W0^T + sum_j b_kj * ((a_kj * x) W0^T): one matmul over all ranks, segments and the offset."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, offset: Sequence[float], segments: Segments) -> Tensor:
        rank, residual = A.shape[1], any(offset)
        expanded = x.new_empty(rank + residual, *x.shape)
        for k, start, end in segments:
            torch.mul(x[None, start:end], A[k][:, None], out=expanded[:rank, start:end])
        if residual:
            expanded[rank] = x
        z = expanded.view(-1, x.shape[1]) @ weight.T
        z = z.view(rank + residual, x.shape[0], weight.shape[0])
        y = torch.empty_like(z[0])
        for k, start, end in segments:
            torch.sum(z[:rank, start:end] * B[k].T[:, None], dim=0, out=y[start:end])
            if offset[k]:
                y[start:end].add_(z[rank, start:end], alpha=offset[k])
        ctx.save_for_backward(x, weight, A, B, z[:rank])
        ctx.offset, ctx.segments = offset, segments
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, z = ctx.saved_tensors
        rank, residual = A.shape[1], any(ctx.offset)
        dz = dy.new_empty(rank + residual, *dy.shape)
        for k, start, end in ctx.segments:
            torch.mul(dy[None, start:end], B[k].T[:, None], out=dz[:rank, start:end])
            if residual:
                torch.mul(dy[start:end], ctx.offset[k], out=dz[rank, start:end])
        dexpanded = (dz.view(-1, dy.shape[1]) @ weight).view(rank + residual, *x.shape)
        dx = torch.empty_like(x)
        dA, dB = torch.zeros_like(A), torch.zeros_like(B)
        for k, start, end in ctx.segments:
            torch.sum(dexpanded[:rank, start:end] * A[k][:, None], dim=0, out=dx[start:end])
            if residual:
                dx[start:end] += dexpanded[rank, start:end]
            dA[k] = torch.sum(dexpanded[:rank, start:end] * x[start:end], dim=1, dtype=A.dtype)
            dB[k] = torch.sum(z[:, start:end] * dy[start:end], dim=1, dtype=B.dtype).T
        return dx, None, dA, dB, None, None


def _is_half(weight: Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16)


def _modulate(weight: Tensor, A: Tensor, B: Tensor, offset: float, out: Tensor) -> Tensor:
    """W0 * (offset + B A) into `out` [out, in]; the product B A is formed in A's dtype (float32 masters)."""
    if _is_half(weight):
        return _deviation(weight, A, B, offset, out).add_(weight)
    product = torch.mm(B, A, out=out)
    if offset:
        product.add_(offset)
    return product.mul_(weight)


def _deviation(weight: Tensor, A: Tensor, B: Tensor, offset: float, out: Tensor) -> Tensor:
    """W0 * (M - 1) into `out` [out, in] of the weight's half type; M - 1 is formed in A's dtype."""
    deviation = B @ A
    if offset != 1.0:
        deviation.add_(offset - 1.0)
    return out.copy_(deviation).mul_(weight)
