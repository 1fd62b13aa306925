"""fLoRA in Triton: W0 * M is formed a tile at a time, in registers, and never exists as a whole.

All adapters of the batch run in one launch each for y, dX and dA/dB. A table on the device says which tokens of which
segment a program takes; its length depends on the numbers of tokens and segments alone, so that nothing waits for the
device. One kernel serves y and dX: dX is the same sum with the roles of A and B, and of W0 and its transpose, exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from flora_train.kernels.blocks import block_table, like, place, rank_table
from flora_train.kernels.flora_tiles import (
    BLOCK_SUMMED,
    GRADIENT_WARPS,
    block_features,
    block_tokens,
    compute_capability,
    gradient_tile,
    gradient_tiles,
    tuning,
)
from flora_train.kernels.ia3_triton import FusedScale
from flora_train.kernels.segments import Segments, per_segment


@triton.jit
def _modulated_matmul(
    x, weight, left, right, offset, blocks, ranks, order, y,
    features, summed,
    x_token, weight_feature, weight_summed,
    left_segment, left_feature, left_rank,
    right_segment, right_rank, right_summed,
    y_token,
    RANK: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, SUMMED: tl.constexpr,
    SPLIT: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[t, f] = sum_s x[t, s] weight[f, s] (offset_k + sum_j left[k, f, j] right[k, j, s]) for the tokens of one block.

    SPLIT: the sum of x weight and x (weight * (M - 1)), which half precision needs for an M near 1; M itself is then summed
    from three products of tf32, because one has no more than ten bits.
    """
    block = tl.program_id(0)
    k = tl.load(blocks + 3 * block).to(tl.int64)
    if k < 0:
        return
    rank = tl.load(ranks + k)
    tokens = tl.load(blocks + 3 * block + 1) + tl.arange(0, TOKENS)
    there = tokens < tl.load(blocks + 3 * block + 2)
    tokens = place(tokens, there, order, ORDERED)
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    j = tl.arange(0, RANK)
    left_tile = tl.load(
        left + k * left_segment + f[:, None] * left_feature + j[None, :] * left_rank,
        mask=(f[:, None] < features) & (j[None, :] < rank),
        other=0.0,
    ).to(tl.float32)
    shift = tl.load(offset + k)
    acc = tl.zeros((FEATURES, TOKENS), tl.float32)
    for first in range(0, summed, SUMMED):
        s = first + tl.arange(0, SUMMED)
        x_tile = tl.load(x + tokens[:, None] * x_token + s[None, :], mask=there[:, None] & (s[None, :] < summed), other=0.0)
        w_tile = tl.load(
            weight + f[:, None] * weight_feature + s[None, :] * weight_summed,
            mask=(f[:, None] < features) & (s[None, :] < summed),
            other=0.0,
        )
        right_tile = tl.load(
            right + k * right_segment + j[:, None] * right_rank + s[None, :] * right_summed,
            mask=(j[:, None] < rank) & (s[None, :] < summed),
            other=0.0,
        ).to(tl.float32)
        M = tl.dot(left_tile, right_tile, input_precision="tf32x3" if SPLIT else PRECISION) + shift
        x_columns = tl.trans(x_tile)
        if SPLIT:
            acc = tl.dot(w_tile, x_columns, acc, input_precision=PRECISION)
            M -= 1.0
        acc = tl.dot((w_tile.to(tl.float32) * M).to(w_tile.dtype), x_columns, acc, input_precision=PRECISION)
    places = y + tokens[:, None] * y_token + f[None, :]
    tl.store(places, tl.trans(acc).to(y.dtype.element_ty), mask=there[:, None] & (f[None, :] < features))


@triton.jit
def _adapter_gradients(
    x, dy, weight, A, B, bounds, ranks, order, dA, dB,
    in_features, out_features, rank, K, out_tiles, in_tiles,
    RANK: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr,
    ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P = W0 * (dY^T X) of one segment, TILE x TILE at a time, and what it adds to dB = P A^T and dA = B^T P. A program takes
    out_tiles x in_tiles of them, and sums over them in its own part of dA and dB, which a cache holds.

    dA: [programs along out, K, rank, in]; dB: [programs along in, K, out, rank]: parts to be summed, in one order every run.
    """
    k, out_part, in_part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    j = tl.arange(0, RANK)
    start, end = tl.load(bounds + k), tl.load(bounds + k + 1)
    used = j < tl.load(ranks + k)
    A += k * rank * in_features
    B += k * out_features * rank
    dA += (out_part * K + k) * rank * in_features
    dB += (in_part * K + k) * out_features * rank
    for tile in range(out_tiles * in_tiles):
        o = (out_part * out_tiles + tile // in_tiles) * TILE + tl.arange(0, TILE)
        i = (in_part * in_tiles + tile % in_tiles) * TILE + tl.arange(0, TILE)
        G = tl.zeros((TILE, TILE), tl.float32)
        for first in range(start, end, TOKENS):
            t = first + tl.arange(0, TOKENS)
            there = t < end
            t = place(t, there, order, ORDERED)
            dy_tile = tl.load(
                dy + t[:, None] * out_features + o[None, :], mask=there[:, None] & (o[None, :] < out_features), other=0.0
            )
            x_tile = tl.load(
                x + t[:, None] * in_features + i[None, :], mask=there[:, None] & (i[None, :] < in_features), other=0.0
            )
            G = tl.dot(tl.trans(dy_tile), x_tile, G, input_precision=PRECISION)
        inside = (o[:, None] < out_features) & (i[None, :] < in_features)
        P = G * tl.load(weight + o[:, None] * in_features + i[None, :], mask=inside, other=0.0).to(tl.float32)
        of_A, A_there = j[:, None] * in_features + i[None, :], (j[:, None] < rank) & (i[None, :] < in_features)
        of_B, B_there = o[:, None] * rank + j[None, :], (o[:, None] < out_features) & (j[None, :] < rank)
        A_tile = tl.load(A + of_A, mask=A_there & used[:, None], other=0.0).to(tl.float32)
        dB_tile = tl.dot(P, tl.trans(A_tile), input_precision=PRECISION)
        dB_tile += tl.load(dB + of_B, mask=B_there & (tile % in_tiles > 0), other=0.0)
        tl.store(dB + of_B, dB_tile, mask=B_there)
        B_tile = tl.load(B + of_B, mask=B_there & used[None, :], other=0.0).to(tl.float32)
        dA_tile = tl.dot(tl.trans(B_tile), P, input_precision=PRECISION)
        dA_tile += tl.load(dA + of_A, mask=A_there & (tile >= in_tiles), other=0.0)
        tl.store(dA + of_A, dA_tile, mask=A_there)
        tl.debug_barrier()  # the next tile adds to what all threads have written


@torch.library.custom_op("flora_train::flora", mutates_args=())
def flora_op(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offset: Tensor,
    bounds: Tensor,
    blocks: Tensor,
    ranks: Tensor,
    order: Tensor | None,
    tokens: int,
    split: bool,
) -> Tensor:
    """x [T, in], weight [out, in], A [K, r, in], B [K, out, r], offset [K], bounds [K + 1] int32, blocks [n, 3] int32 (see
    `block_table`) of `tokens` tokens, ranks [K] int32, order [T] or None -> [T, out]."""
    x, A, B = x.contiguous(), A.contiguous(), B.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    _launch_matmul(x, weight, B, A, offset, blocks, ranks, order, y, tokens, split)
    return y


@torch.library.custom_op("flora_train::flora_backward", mutates_args=())
def flora_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offset: Tensor,
    bounds: Tensor,
    blocks: Tensor,
    ranks: Tensor,
    order: Tensor | None,
    tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB), of the shapes and types of x, A and B."""
    dy, x, weight, A, B = (tensor.contiguous() for tensor in (dy, x, weight, A, B))
    (K, rank, in_features), out_features = A.shape, B.shape[1]
    dx = torch.empty_like(x)
    _launch_matmul(dy, weight.T, A.mT, B.mT, offset, blocks, ranks, order, dx, tokens, split=False)
    tile = gradient_tile(x.dtype)
    tiles = gradient_tiles(K, triton.cdiv(out_features, tile), triton.cdiv(in_features, tile))
    out_parts, in_parts = (
        triton.cdiv(features, n * tile) for features, n in zip((out_features, in_features), tiles, strict=True)
    )
    dA = A.new_empty(out_parts, *A.shape, dtype=torch.float32)
    dB = B.new_empty(in_parts, *B.shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _adapter_gradients[(K, out_parts, in_parts)](
            x, dy, weight, A, B, bounds, ranks, ranks if order is None else order, dA, dB, in_features, out_features, rank, K, *tiles,
            TOKENS=BLOCK_SUMMED, TILE=tile, ORDERED=order is not None, **tuning(x.dtype, rank) | {"num_warps": GRADIENT_WARPS},
        )  # fmt: skip
    return dx, dA.sum(0).to(A.dtype), dB.sum(0).to(B.dtype)


@flora_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@flora_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), like(A), like(B)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tokens, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dA, dB = flora_backward_op(dy, *ctx.saved_tensors, ctx.tokens)
    return dx, None, dA, dB, *[None] * 7


flora_op.register_autograd(_backward, setup_context=_save)


class FusedFlora:
    """y = x (W0 * M_k)^T per segment. Shapes and dtypes as `flora_linear`, but float64."""

    @staticmethod
    def apply(
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        offset: Sequence[float],
        segments: Segments,
        split: bool,
        order: Tensor | None = None,
    ) -> Tensor:
        tokens = block_tokens(segments, x.dtype, A.shape[1], compute_capability(x.device))
        bounds, blocks = block_table(segments, x.device, tokens)
        ranks = rank_table(segments, A.shape[1], x.device)
        shift = per_segment(offset, A).view(-1).float()
        return flora_op(x, weight, A, B, shift, bounds, blocks, ranks, order, tokens, split)


class ScaledFlora:
    """Pure fLoRA of rank 1, y = b_k * ((a_k * x) W0^T) per segment: between two scales the tokens of all adapters go
    through W0 at once."""

    @staticmethod
    def apply(
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        offset: Sequence[float],
        segments: Segments,
        split: bool,
        order: Tensor | None = None,
    ) -> Tensor:
        if A.shape[1] != 1 or any(offset) or split:
            raise ValueError("two scales around W0 are pure fLoRA of rank 1, not split")
        scaled = FusedScale.apply(x, A[:, 0], segments, order)
        return FusedScale.apply(F.linear(scaled, weight), B[:, :, 0], segments, order)


def _launch_matmul(
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    offset: Tensor,
    blocks: Tensor,
    ranks: Tensor,
    order: Tensor | None,
    y: Tensor,
    tokens: int,
    split: bool,
) -> None:
    """x [T, summed], weight [features, summed], left [K, features, rank], right [K, rank, summed] -> y [T, features]; weight,
    left and right as they lie in memory."""
    (features, summed), rank = weight.shape, left.shape[2]
    tile = block_features(x.dtype, rank)
    with torch.cuda.device_of(x):
        _modulated_matmul[(len(blocks), triton.cdiv(features, tile))](
            x, weight, left, right, offset, blocks, ranks, ranks if order is None else order, y, features, summed,
            x.stride(0), *weight.stride(), *left.stride(), *right.stride(), y.stride(0),
            TOKENS=tokens, FEATURES=tile, SUMMED=BLOCK_SUMMED,
            SPLIT=split, ORDERED=order is not None, **tuning(x.dtype, rank),
        )  # fmt: skip
