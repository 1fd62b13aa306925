"""LoRA in Triton: shrink (x A^T), expand (onto the base output) and their gradients, one launch each for all
adapters.

Tokens are not moved: a table on the device maps tiles of tokens to adapters, so that segments of any length,
including empty ones, need neither padding nor a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import autocast_disabled
from flora_train.kernels.segments import Segments, per_segment
from flora_train.kernels.triton_common import (
    TILE_FEATURES,
    TILE_TOKENS,
    any_order,
    empty_contiguous,
    matmul_constants,
    part_of_segment,
    parts_for,
    tile_table,
    token_index,
)


@triton.jit
def _shrink(
    x, stack, scaling, table, order, hidden,
    features, rank, T,
    stack_segment, stack_rank, stack_feature,
    RANK: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, PARTS: tl.constexpr,
    ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden[part, t, j] = scaling_k sum_f x[t, f] stack[k, j, f], f over one part of the features; hidden is
    float32."""
    tile, part = tl.program_id(0), tl.program_id(1)
    k = tl.load(table + 3 * tile).to(tl.int64)
    if k < 0:
        return
    t = tl.load(table + 3 * tile + 1) + tl.arange(0, TOKENS)
    token_mask = t < tl.load(table + 3 * tile + 2)
    t = token_index(t, token_mask, order, ORDERED)
    j = tl.arange(0, RANK)
    rank_mask = j < rank
    length = tl.cdiv(tl.cdiv(features, PARTS), FEATURES) * FEATURES
    end = tl.minimum((part + 1) * length, features)
    acc = tl.zeros((TOKENS, RANK), tl.float32)
    for first in range(part * length, end, FEATURES):
        f = first + tl.arange(0, FEATURES)
        x_tile = tl.load(
            x + t[:, None] * features + f[None, :], mask=token_mask[:, None] & (f[None, :] < end), other=0.0
        )
        factor = tl.load(
            stack + k * stack_segment + f[:, None] * stack_feature + j[None, :] * stack_rank,
            mask=(f[:, None] < end) & rank_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(x_tile, factor.to(x_tile.dtype), acc, input_precision=PRECISION)
    acc *= tl.load(scaling + k)
    tl.store(
        hidden + (part * T + t[:, None]) * rank + j[None, :],
        acc,
        mask=token_mask[:, None] & rank_mask[None, :],
    )


@triton.jit
def _expand(
    hidden, stack, table, order, y,
    features, rank,
    stack_segment, stack_feature, stack_rank,
    RANK: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, ADD: tl.constexpr,
    ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[t, f] = sum_j hidden[t, j] stack[k, f, j], RANK terms at a time, or += with ADD: rounded once, after
    the sum."""
    tile = tl.program_id(0)
    k = tl.load(table + 3 * tile).to(tl.int64)
    if k < 0:
        return
    t = tl.load(table + 3 * tile + 1) + tl.arange(0, TOKENS)
    token_mask = t < tl.load(table + 3 * tile + 2)
    t = token_index(t, token_mask, order, ORDERED)
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    dtype = y.dtype.element_ty
    pointers = y + t[:, None] * features + f[None, :]
    mask = token_mask[:, None] & (f[None, :] < features)
    acc = tl.zeros((TOKENS, FEATURES), tl.float32)
    if ADD:
        acc += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    for first in range(0, rank, RANK):
        j = first + tl.arange(0, RANK)
        h = tl.load(
            hidden + t[:, None] * rank + j[None, :], mask=token_mask[:, None] & (j[None, :] < rank), other=0.0
        )
        factor = tl.load(
            stack + k * stack_segment + f[None, :] * stack_feature + j[:, None] * stack_rank,
            mask=(f[None, :] < features) & (j[:, None] < rank),
            other=0.0,
        )
        acc = tl.dot(h.to(dtype), factor.to(dtype), acc, input_precision=PRECISION)
    tl.store(pointers, acc.to(dtype), mask=mask)


@triton.jit
def _outer(
    hidden, tokens, bounds, order, parts,
    features, rank, K,
    RANK: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, PARTS: tl.constexpr,
    ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[part, k, j, f] = sum_t hidden[t, j] tokens[t, f] over one part of the tokens of segment k."""
    k, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    f, j = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES), tl.arange(0, RANK)
    start, end = part_of_segment(bounds, k, part, PARTS, TOKENS)
    acc = tl.zeros((RANK, FEATURES), tl.float32)
    for first in range(start, end, TOKENS):
        t = first + tl.arange(0, TOKENS)
        token_mask = t < end
        t = token_index(t, token_mask, order, ORDERED)
        h = tl.load(
            hidden + t[None, :] * rank + j[:, None], mask=token_mask[None, :] & (j[:, None] < rank), other=0.0
        )
        tile = tl.load(
            tokens + t[:, None] * features + f[None, :],
            mask=token_mask[:, None] & (f[None, :] < features),
            other=0.0,
        )
        acc = tl.dot(h.to(tile.dtype), tile, acc, input_precision=PRECISION)
    row = (part * K + k) * rank + j[:, None]
    tl.store(parts + row * features + f[None, :], acc, mask=(j[:, None] < rank) & (f[None, :] < features))


def _add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Tensor, table: Tensor, order: Tensor | None
) -> Tensor:
    """y [T, out] += (scaling_k x A_k^T) B_k^T, for x [T, in], A [K, r, in], B [K, out, r] and scaling [K].

    table: see `tile_table`; order: [T] or None. Returns scaling_k x A_k^T, [T, r] float32, for the backward.
    """
    with torch.cuda.device_of(x):
        hidden = _launch_shrink(x, A, scaling, table, order)
        _launch_expand(hidden, B, table, order, y=y, add=True)
        return hidden


def _gradients(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: Tensor,
    bounds: Tensor,
    table: Tensor,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB), of the shapes and dtypes of x, A and B."""
    with torch.cuda.device_of(x):
        dhidden = _launch_shrink(dy, B.mT, scaling, table, order)
        dx = torch.empty_like(x)
        _launch_expand(dhidden, A.mT, table, order, y=dx, add=False)
        dA, dB = _launch_outer(dhidden, x, bounds, order), _launch_outer(hidden, dy, bounds, order)
        return dx, dA.to(A.dtype), dB.mT.contiguous().to(B.dtype)


lora_add_op = torch.library.custom_op("flora_train::lora_add", _add, mutates_args=("y",))
lora_backward_op = torch.library.custom_op("flora_train::lora_backward", _gradients, mutates_args=())
"""For torch.compile, which treats them as opaque. Otherwise not used: their dispatch takes longer than some
layers on a GPU."""


@lora_add_op.register_fake
def _(y: Tensor, x: Tensor, A: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[1], dtype=torch.float32)


@lora_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, hidden: Tensor, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_contiguous(x), empty_contiguous(A), empty_contiguous(B)


class FusedLora(torch.autograd.Function):
    """y += scaling_k (x A_k^T) B_k^T, in place. Shapes and dtypes as `lora_add`, except float64."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: Sequence[float],
        segments: Segments,
        order: Tensor | None = None,
    ) -> Tensor:
        ctx.mark_dirty(y)
        x, A, B = x.contiguous(), A.contiguous(), B.contiguous()
        bounds, table = tile_table(segments, x.device)
        scales = per_segment(scaling, A).view(-1)
        add = lora_add_op if torch.compiler.is_compiling() else _add
        hidden = add(y, x, A, B, scales, table, order)
        ctx.save_for_backward(x, hidden, A, B, scales, bounds, table, order)
        return y

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = lora_backward_op if torch.compiler.is_compiling() else _gradients
        return dy, *gradients(dy.contiguous(), *ctx.saved_tensors), None, None, None


def tuning(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """Compile-time constants of shrink and outer: a large rank needs more threads for its registers
    (benchmarks/compile_kernels.py)."""
    constants = matmul_constants(dtype, rank)
    return constants | {"num_warps": 8 if constants["RANK"] > 16 else 4}


def expand_tuning(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """Compile-time constants of expand: a large rank is processed in steps that fit into registers."""
    step = 16 if dtype == torch.float32 else 32
    return matmul_constants(dtype, min(rank, step)) | {"num_warps": 4}


def _launch_shrink(x: Tensor, stack: Tensor, scaling: Tensor, table: Tensor, order: Tensor | None) -> Tensor:
    """x [T, features] and stack [K, rank, features], of any strides -> [T, rank] float32."""
    (T, features), rank = x.shape, stack.shape[1]
    parts = parts_for(len(table))
    hidden = x.new_empty(parts, T, rank, dtype=torch.float32)
    _shrink[(len(table), parts)](
        x, stack, scaling, table, any_order(order, table), hidden, features, rank, T, *stack.stride(),
        TOKENS=TILE_TOKENS, FEATURES=TILE_FEATURES, PARTS=parts, ORDERED=order is not None,
        **tuning(x.dtype, rank),
    )  # fmt: skip
    return hidden.sum(0)


def _launch_expand(
    hidden: Tensor, stack: Tensor, table: Tensor, order: Tensor | None, *, y: Tensor, add: bool
) -> None:
    """hidden [T, rank] and stack [K, features, rank], of any strides -> y [T, features], added with `add`."""
    features, rank = y.shape[1], hidden.shape[1]
    _expand[(len(table), triton.cdiv(features, TILE_FEATURES))](
        hidden, stack, table, any_order(order, table), y, features, rank, *stack.stride(),
        TOKENS=TILE_TOKENS, FEATURES=TILE_FEATURES, ADD=add, ORDERED=order is not None,
        **expand_tuning(y.dtype, rank),
    )  # fmt: skip


def _launch_outer(hidden: Tensor, tokens: Tensor, bounds: Tensor, order: Tensor | None) -> Tensor:
    """hidden [T, rank] and tokens [T, features] -> the sum over each segment's tokens, [K, rank, features]
    float32."""
    rank, features, K = hidden.shape[1], tokens.shape[1], len(bounds) - 1
    columns = triton.cdiv(features, TILE_FEATURES)
    parts = parts_for(K * columns)
    sums = tokens.new_empty(parts, K, rank, features, dtype=torch.float32)
    _outer[(K, columns, parts)](
        hidden, tokens, bounds, any_order(order, bounds), sums, features, rank, K,
        TOKENS=TILE_TOKENS, FEATURES=TILE_FEATURES, PARTS=parts, ORDERED=order is not None,
        **tuning(tokens.dtype, rank),
    )  # fmt: skip
    return sums.sum(0)
