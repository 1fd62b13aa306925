"""Sparse changes by gathers: only the masked entries are multiplied, for all adapters of a batch at once.

Tokens are the columns here, so that a gathered feature is consecutive memory. The entries of the mask are
processed in blocks, which bound the memory that a layer needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import autocast_disabled
from flora_train.kernels.segments import Segments, expand_to_units, reduce_units

BLOCK_NUMBERS = 2**20
"""Numbers that a block of gathered features holds."""


class GatheredSparse(torch.autograd.Function):
    """y_t += dW_k x_t, in place. Shapes as `sparse_add`."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, values: Tensor, indices: Tensor, segments: Segments
    ) -> Tensor:
        ctx.mark_dirty(y)
        columns = _as_columns(x)
        delta = columns.new_zeros(y.shape[1], y.shape[0])
        for block, rows, features in _blocks(indices, x.shape):
            delta.index_add_(0, rows, _scaled(columns[features], values[:, block], segments))
        y.add_(delta.T)
        ctx.save_for_backward(x, values, indices)
        ctx.segments = segments
        return y

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        segments = ctx.segments
        columns, dcolumns = _as_columns(x), _as_columns(dy)
        dvalues = torch.empty_like(values)
        dx = torch.zeros_like(columns) if ctx.needs_input_grad[1] else None
        for block, rows, features in _blocks(indices, x.shape):
            gathered = dcolumns[rows]
            products = _units(gathered * columns[features], segments).sum(2)
            dvalues[:, block] = reduce_units(products.T, segments, values.dtype)
            if dx is not None:
                dx.index_add_(0, features, _scaled(gathered, values[:, block], segments))
        if dx is not None:
            dx = dx.T.to(x.dtype)
        return dy, dx, dvalues, None, None


def _as_columns(tokens: Tensor) -> Tensor:
    """[T, d] -> [d, T], contiguous, at least float32: sums of single entries need its precision."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return tokens.T.to(wide).contiguous()


def _blocks(indices: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(entries, their rows, their columns) for blocks of the mask. shape: [T, in] of the tokens."""
    tokens, inputs = shape
    size = max(1, BLOCK_NUMBERS // max(1, tokens))
    for start in range(0, len(indices), size):
        block = slice(start, start + size)
        rows = torch.div(indices[block], inputs, rounding_mode="floor")
        yield block, rows, indices[block] - rows * inputs


def _scaled(gathered: Tensor, values: Tensor, segments: Segments) -> Tensor:
    """Features [n, T] times the values [K, n] of each token's segment."""
    factors = expand_to_units(values.to(gathered.dtype), segments).T
    return (_units(gathered, segments) * factors[:, :, None]).view_as(gathered)


def _units(gathered: Tensor, segments: Segments) -> Tensor:
    """[n, T] -> [n, U, unit]: a view."""
    return gathered.view(len(gathered), segments.tokens // segments.unit, segments.unit)
