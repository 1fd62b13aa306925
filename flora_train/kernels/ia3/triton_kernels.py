"""IA3 in Triton: y = x * scale_k, and both gradients in one pass over the tokens."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.segments import Segments
from flora_train.kernels.triton_common import (
    TILE_FEATURES,
    TILE_TOKENS,
    any_order,
    empty_contiguous,
    part_of_segment,
    parts_for,
    tile_table,
    token_index,
)


@triton.jit
def _scale(
    x, scale, table, order, y, features, TOKENS: tl.constexpr, FEATURES: tl.constexpr, ORDERED: tl.constexpr
):
    """y[t, f] = x[t, f] scale[k, f], formed in float32, because half precision cannot represent a scale near
    1."""
    tile = tl.program_id(0)
    k = tl.load(table + 3 * tile).to(tl.int64)
    if k < 0:
        return
    t = tl.load(table + 3 * tile + 1) + tl.arange(0, TOKENS)
    token_mask = t < tl.load(table + 3 * tile + 2)
    t = token_index(t, token_mask, order, ORDERED)
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    mask = token_mask[:, None] & (f[None, :] < features)
    row = tl.load(scale + k * features + f, mask=f < features, other=0.0).to(tl.float32)
    index = t[:, None] * features + f[None, :]
    product = tl.load(x + index, mask=mask, other=0.0).to(tl.float32) * row[None, :]
    tl.store(y + index, product.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _scale_gradients(
    x, dy, scale, bounds, order, dx, sums, features, K,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, PARTS: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """dx = dy scale_k, and sums[part, k, f] = sum_t dy[t, f] x[t, f], over one part of the tokens of segment
    k."""
    k, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    start, end = part_of_segment(bounds, k, part, PARTS, TOKENS)
    row = tl.load(scale + k * features + f, mask=f < features, other=0.0).to(tl.float32)
    acc = tl.zeros((FEATURES,), tl.float32)
    for first in range(start, end, TOKENS):
        t = first + tl.arange(0, TOKENS)
        token_mask = t < end
        t = token_index(t, token_mask, order, ORDERED)
        index = t[:, None] * features + f[None, :]
        mask = token_mask[:, None] & (f[None, :] < features)
        dy_tile = tl.load(dy + index, mask=mask, other=0.0).to(tl.float32)
        x_tile = tl.load(x + index, mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(dy_tile * x_tile, axis=0)
        tl.store(dx + index, (dy_tile * row[None, :]).to(dx.dtype.element_ty), mask=mask)
    tl.store(sums + (part * K + k) * features + f, acc, mask=f < features)


@torch.library.custom_op("flora_train::ia3", mutates_args=())
def ia3_op(x: Tensor, scale: Tensor, bounds: Tensor, table: Tensor, order: Tensor | None) -> Tensor:
    """x [T, d], scale [K, d], bounds and table as `tile_table`, order [T] or None -> [T, d]."""
    return _forward(x.contiguous(), scale.contiguous(), table, order)


@torch.library.custom_op("flora_train::ia3_backward", mutates_args=())
def ia3_backward_op(
    dy: Tensor, x: Tensor, scale: Tensor, bounds: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx, dscale), of the shapes and dtypes of x and scale."""
    return _backward(dy, x.contiguous(), scale.contiguous(), bounds, order)


@ia3_op.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return empty_contiguous(x)


@ia3_backward_op.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_contiguous(x), empty_contiguous(scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, bounds, _, order = inputs
    ctx.save_for_backward(x, scale, bounds, order)


def _compiled_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *ia3_backward_op(dy, *ctx.saved_tensors), None, None, None


ia3_op.register_autograd(_compiled_backward, setup_context=_save)


class _Scale(torch.autograd.Function):
    """`ia3_op` without the dispatch that torch.compile needs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bounds: Tensor, table: Tensor, order: Tensor | None
    ) -> Tensor:
        x, scale = x.contiguous(), scale.contiguous()
        ctx.save_for_backward(x, scale, bounds, order)
        return _forward(x, scale, table, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(dy, *ctx.saved_tensors), None, None, None


def _forward(x: Tensor, scale: Tensor, table: Tensor, order: Tensor | None) -> Tensor:
    y, features = torch.empty_like(x), x.shape[1]
    with torch.cuda.device_of(x):
        _scale[(len(table), triton.cdiv(features, TILE_FEATURES))](
            x, scale, table, any_order(order, table), y, features,
            TOKENS=TILE_TOKENS, FEATURES=TILE_FEATURES, ORDERED=order is not None,
        )  # fmt: skip
    return y


def _backward(
    dy: Tensor, x: Tensor, scale: Tensor, bounds: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()
    dx, (K, features) = torch.empty_like(x), scale.shape
    columns = triton.cdiv(features, TILE_FEATURES)
    parts = parts_for(K * columns)
    sums = x.new_empty(parts, K, features, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _scale_gradients[(K, columns, parts)](
            x, dy, scale, bounds, any_order(order, bounds), dx, sums, features, K,
            TOKENS=TILE_TOKENS, FEATURES=TILE_FEATURES, PARTS=parts, ORDERED=order is not None,
        )  # fmt: skip
    return dx, sums.sum(0).to(scale.dtype)


class FusedScale:
    """y = x * scale_k per segment. Shapes and dtypes as `ia3_scale`, except float64."""

    @staticmethod
    def apply(x: Tensor, scale: Tensor, segments: Segments, order: Tensor | None = None) -> Tensor:
        op = ia3_op if torch.compiler.is_compiling() else _Scale.apply
        return op(x, scale, *tile_table(segments, x.device), order)
