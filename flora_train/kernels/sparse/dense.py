"""Sparse changes by dense matmuls: one adapter after the other in the memory of one weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import autocast_disabled
from flora_train.kernels.segments import Segments


class DenseSparse(torch.autograd.Function):
    """y_t += dW_k x_t, in place. Shapes as `sparse_add`.

    The adapters share a mask: what one writes into the dense weight, the next overwrites, and the rest of it
    stays zero.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, values: Tensor, indices: Tensor, segments: Segments
    ) -> Tensor:
        ctx.mark_dirty(y)
        change = x.new_zeros(y.shape[1], x.shape[1])
        for k, start, end in segments:
            change.view(-1)[indices] = values[k].to(x.dtype)
            y[start:end].addmm_(x[start:end], change.T)
        ctx.save_for_backward(x, values, indices)
        ctx.segments = segments
        return y

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        dvalues = torch.zeros_like(values)
        change = x.new_zeros(dy.shape[1], x.shape[1])
        gradient = torch.empty_like(change)
        for k, start, end in ctx.segments:
            torch.mm(dy[start:end].T, x[start:end], out=gradient)
            dvalues[k] = gradient.view(-1)[indices].to(values.dtype)
            if dx is not None:
                change.view(-1)[indices] = values[k].to(x.dtype)
                torch.mm(dy[start:end], change, out=dx[start:end])
        return dy, dx, dvalues, None, None
