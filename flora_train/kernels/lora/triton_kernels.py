"""LoRA in Triton: shrink (x A^T), expand (onto the base output) and their gradients, all adapters in one launch each.

The tokens stay where they are: a table on the device says which block of tokens belongs to which adapter, so that segments
of any length, empty ones too, need neither padding nor a loop.
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
    BLOCK_FEATURES,
    BLOCK_TOKENS,
    block_table,
    like,
    matmul_constants,
    part_of_segment,
    parts_for,
    place,
    rank_table,
)


@triton.jit
def _shrink(
    x, stack, scaling, blocks, ranks, order, hidden,
    features, rank, T,
    stack_segment, stack_rank, stack_feature,
    RANK: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, PARTS: tl.constexpr,
    ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden[part, t, j] = scaling_k sum_f x[t, f] stack[k, j, f], f over one part of the features; hidden is float32."""
    block, part = tl.program_id(0), tl.program_id(1)
    k = tl.load(blocks + 3 * block).to(tl.int64)
    if k < 0:
        return
    t = tl.load(blocks + 3 * block + 1) + tl.arange(0, TOKENS)
    there = t < tl.load(blocks + 3 * block + 2)
    t = place(t, there, order, ORDERED)
    j = tl.arange(0, RANK)
    used = j < tl.load(ranks + k)
    length = tl.cdiv(tl.cdiv(features, PARTS), FEATURES) * FEATURES
    end = tl.minimum((part + 1) * length, features)
    acc = tl.zeros((TOKENS, RANK), tl.float32)
    for first in range(part * length, end, FEATURES):
        f = first + tl.arange(0, FEATURES)
        x_tile = tl.load(x + t[:, None] * features + f[None, :], mask=there[:, None] & (f[None, :] < end), other=0.0)
        factor = tl.load(
            stack + k * stack_segment + f[:, None] * stack_feature + j[None, :] * stack_rank,
            mask=(f[:, None] < end) & used[None, :],
            other=0.0,
        )
        acc = tl.dot(x_tile, factor.to(x_tile.dtype), acc, input_precision=PRECISION)
    acc *= tl.load(scaling + k)
    tl.store(hidden + (part * T + t[:, None]) * rank + j[None, :], acc, mask=there[:, None] & (j[None, :] < rank))


@triton.jit
def _expand(
    hidden, stack, blocks, ranks, order, y,
    features, rank,
    stack_segment, stack_feature, stack_rank,
    RANK: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, ADD: tl.constexpr,
    ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[t, f] = sum_j hidden[t, j] stack[k, f, j], RANK terms at a time, or += with ADD: rounded once, after the sum."""
    block = tl.program_id(0)
    k = tl.load(blocks + 3 * block).to(tl.int64)
    if k < 0:
        return
    t = tl.load(blocks + 3 * block + 1) + tl.arange(0, TOKENS)
    there = t < tl.load(blocks + 3 * block + 2)
    t = place(t, there, order, ORDERED)
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    dtype = y.dtype.element_ty
    places, mask = y + t[:, None] * features + f[None, :], there[:, None] & (f[None, :] < features)
    acc = tl.zeros((TOKENS, FEATURES), tl.float32)
    if ADD:
        acc += tl.load(places, mask=mask, other=0.0).to(tl.float32)
    used = tl.load(ranks + k)
    for first in range(0, used, RANK):
        j = first + tl.arange(0, RANK)
        h = tl.load(hidden + t[:, None] * rank + j[None, :], mask=there[:, None] & (j[None, :] < used), other=0.0)
        factor = tl.load(
            stack + k * stack_segment + f[None, :] * stack_feature + j[:, None] * stack_rank,
            mask=(f[None, :] < features) & (j[:, None] < used),
            other=0.0,
        )
        acc = tl.dot(h.to(dtype), factor.to(dtype), acc, input_precision=PRECISION)
    tl.store(places, acc.to(dtype), mask=mask)


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
        there = t < end
        t = place(t, there, order, ORDERED)
        h = tl.load(hidden + t[None, :] * rank + j[:, None], mask=there[None, :] & (j[:, None] < rank), other=0.0)
        tile = tl.load(tokens + t[:, None] * features + f[None, :], mask=there[:, None] & (f[None, :] < features), other=0.0)
        acc = tl.dot(h.to(tile.dtype), tile, acc, input_precision=PRECISION)
    row = (part * K + k) * rank + j[:, None]
    tl.store(parts + row * features + f[None, :], acc, mask=(j[:, None] < rank) & (f[None, :] < features))


def _add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Tensor, blocks: Tensor, ranks: Tensor, order: Tensor | None
) -> Tensor:
    """y [T, out] += (scaling_k x A_k^T) B_k^T, for x [T, in], A [K, r, in], B [K, out, r], scaling [K]; blocks and ranks as
    `block_table` and `rank_table`, order [T] or None. Returns scaling_k x A_k^T, [T, r] float32, for the backward."""
    with torch.cuda.device_of(x):
        hidden = _launch_shrink(x, A, scaling, blocks, ranks, order)
        _launch_expand(hidden, B, blocks, ranks, order, y, add=True)
        return hidden


def _gradients(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: Tensor,
    bounds: Tensor,
    blocks: Tensor,
    ranks: Tensor,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB), of the shapes and types of x, A and B."""
    with torch.cuda.device_of(x):
        dhidden = _launch_shrink(dy, B.mT, scaling, blocks, ranks, order)
        dx = torch.empty_like(x)
        _launch_expand(dhidden, A.mT, blocks, ranks, order, dx, add=False)
        dA, dB = _launch_outer(dhidden, x, bounds, order), _launch_outer(hidden, dy, bounds, order)
        return dx, dA.to(A.dtype), dB.mT.contiguous().to(B.dtype)


lora_add_op = torch.library.custom_op("flora_train::lora_add", _add, mutates_args=("y",))
lora_backward_op = torch.library.custom_op("flora_train::lora_backward", _gradients, mutates_args=())
"""For torch.compile, which does not look into them; their dispatch takes Python longer than some layers take a GPU."""


@lora_add_op.register_fake
def _(y: Tensor, x: Tensor, A: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[1], dtype=torch.float32)


@lora_backward_op.register_fake
def _(dy: Tensor, x: Tensor, hidden: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), like(A), like(B)


class FusedLora(torch.autograd.Function):
    """y += scaling_k (x A_k^T) B_k^T, in place. Shapes and dtypes as `lora_add`, but float64."""

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
        bounds, blocks = block_table(segments, x.device)
        ranks, scales = rank_table(segments, A.shape[1], x.device), per_segment(scaling, A).view(-1)
        add = lora_add_op if torch.compiler.is_compiling() else _add
        hidden = add(y, x, A, B, scales, blocks, ranks, order)
        ctx.save_for_backward(x, hidden, A, B, scales, bounds, blocks, ranks, order)
        return y

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = lora_backward_op if torch.compiler.is_compiling() else _gradients
        return dy, *gradients(dy.contiguous(), *ctx.saved_tensors), None, None, None


def tuning(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """What shrink and outer are compiled with: a large rank wants more threads to hold its registers
    (benchmarks/compile_kernels.py)."""
    constants = matmul_constants(dtype, rank)
    return constants | {"num_warps": 8 if constants["RANK"] > 16 else 4}


def expand_tuning(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """What expand is compiled with: a large rank is taken in bites that registers hold (float32 has no matmul unit)."""
    return matmul_constants(dtype, min(rank, 16 if dtype == torch.float32 else 32)) | {"num_warps": 4}


def _launch_shrink(x: Tensor, stack: Tensor, scaling: Tensor, blocks: Tensor, ranks: Tensor, order: Tensor | None) -> Tensor:
    """x [T, features] and stack [K, rank, features], however it lies in memory -> [T, rank] float32."""
    (T, features), rank = x.shape, stack.shape[1]
    parts = parts_for(len(blocks))
    hidden = x.new_empty(parts, T, rank, dtype=torch.float32)
    _shrink[(len(blocks), parts)](
        x, stack, scaling, blocks, ranks, ranks if order is None else order, hidden, features, rank, T, *stack.stride(),
        TOKENS=BLOCK_TOKENS, FEATURES=BLOCK_FEATURES, PARTS=parts, ORDERED=order is not None, **tuning(x.dtype, rank),
    )  # fmt: skip
    return hidden.sum(0)


def _launch_expand(
    hidden: Tensor, stack: Tensor, blocks: Tensor, ranks: Tensor, order: Tensor | None, y: Tensor, add: bool
) -> None:
    """hidden [T, rank] and stack [K, features, rank], however it lies in memory -> y [T, features]."""
    features, rank = y.shape[1], hidden.shape[1]
    _expand[(len(blocks), triton.cdiv(features, BLOCK_FEATURES))](
        hidden, stack, blocks, ranks, ranks if order is None else order, y, features, rank, *stack.stride(),
        TOKENS=BLOCK_TOKENS, FEATURES=BLOCK_FEATURES, ADD=add, ORDERED=order is not None, **expand_tuning(y.dtype, rank),
    )  # fmt: skip


def _launch_outer(hidden: Tensor, tokens: Tensor, bounds: Tensor, order: Tensor | None) -> Tensor:
    """hidden [T, rank] and tokens [T, features] -> the sum over each segment's tokens, [K, rank, features] float32."""
    rank, features, K = hidden.shape[1], tokens.shape[1], len(bounds) - 1
    columns = triton.cdiv(features, BLOCK_FEATURES)
    parts = parts_for(K * columns)
    sums = tokens.new_empty(parts, K, rank, features, dtype=torch.float32)
    _outer[(K, columns, parts)](
        hidden, tokens, bounds, bounds if order is None else order, sums, features, rank, K,
        TOKENS=BLOCK_TOKENS, FEATURES=BLOCK_FEATURES, PARTS=parts, ORDERED=order is not None, **tuning(tokens.dtype, rank),
    )  # fmt: skip
    return sums.sum(0)
