"""y = x (W0 * M_k)^T in Triton, and dX, the same sum with A and B, and W0 and its transpose, exchanged.

A tile of W0 * M is formed in registers, multiplied, and not stored. On a Hopper GPU, TMA loads the tiles of x
and W0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flora_train.kernels.flora.triton_tiles import can_use_tma, matmul_tiles, tma_aligned
from flora_train.kernels.triton_common import any_order, matmul_constants, token_index

GROUP = 8
"""Tiles of tokens whose programs run together."""


@triton.jit
def _modulated_matmul(
    x, weight, left, right, offset, near, table, order, y,
    features, summed, n_tiles,
    x_token, weight_feature, weight_summed, y_token,
    RANK: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, SUMMED: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr, ORDERED: tl.constexpr, USES_TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, M_PRECISION: tl.constexpr,
):  # fmt: skip
    """y[t, f] = sum_s x[t, s] weight[f, s] M[k, f, s], M = offset_k + sum_j left[k, f, j] right[k, s, j], for
    the tokens of one row of the table. left [K, features, RANK], right [K, summed, RANK], float32.

    SPLIT: where near[k] is 1, the sum of x weight and x (weight * (M - 1)), which half precision needs for an
    M near 1; where it is 0, x (weight * M). M_PRECISION: how exactly M is summed. USES_TMA: x and weight are
    tensor descriptors, that of weight with its layout in memory: [summed, features] if TRANSPOSED.
    """
    pid = tl.program_id(0)
    # Programs of a group use the same tiles of tokens and of W0 while these are in the cache.
    in_group = GROUP * tl.cdiv(features, FEATURES)
    first_tile = pid // in_group * GROUP
    group = tl.minimum(n_tiles - first_tile, GROUP)
    tile = first_tile + pid % in_group % group
    k = tl.load(table + 3 * tile).to(tl.int64)
    if k < 0:
        return
    first_token, first_feature = tl.load(table + 3 * tile + 1), pid % in_group // group * FEATURES
    t = first_token + tl.arange(0, TOKENS)
    token_mask = t < tl.load(table + 3 * tile + 2)
    tokens = token_index(t, token_mask, order, ORDERED)
    f = first_feature + tl.arange(0, FEATURES)
    j = tl.arange(0, RANK)
    left += k * features * RANK
    right += k * summed * RANK
    left_tile = tl.load(left + f[:, None] * RANK + j[None, :], mask=f[:, None] < features, other=0.0)
    shift = tl.load(offset + k)
    subtracted = tl.load(near + k)
    acc = tl.zeros((FEATURES, TOKENS), tl.float32)
    for first in range(0, summed, SUMMED):
        s = first + tl.arange(0, SUMMED)
        if USES_TMA:
            x_columns = x.load([first_token, first]).T
            w_tile = (
                weight.load([first, first_feature]).T if TRANSPOSED else weight.load([first_feature, first])
            )
        else:
            x_columns = tl.load(
                x + tokens[:, None] * x_token + s[None, :],
                mask=token_mask[:, None] & (s[None, :] < summed),
                other=0.0,
            ).T
            w_tile = tl.load(
                weight + f[:, None] * weight_feature + s[None, :] * weight_summed,
                mask=(f[:, None] < features) & (s[None, :] < summed),
                other=0.0,
            )
        right_tile = tl.load(right + s[None, :] * RANK + j[:, None], mask=s[None, :] < summed, other=0.0)
        M = tl.dot(left_tile, right_tile, input_precision=M_PRECISION) + shift
        if SPLIT:
            if subtracted > 0.5:
                acc = tl.dot(w_tile, x_columns, acc, input_precision=PRECISION)
            M -= subtracted
        acc = tl.dot((w_tile.to(tl.float32) * M).to(w_tile.dtype), x_columns, acc, input_precision=PRECISION)
    pointers = y + tokens[None, :] * y_token + f[:, None]
    tl.store(pointers, acc.to(y.dtype.element_ty), mask=token_mask[None, :] & (f[:, None] < features))


def modulated_matmul(
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    offset: Tensor,
    near: Tensor,
    table: Tensor,
    order: Tensor | None,
    tokens: int,
    split: bool,
    exact: bool = False,
) -> Tensor:
    """y [T, features] for x [T, summed] and weight [features, summed], of any strides.

    left: [K, features, RANK] and right: [K, summed, RANK], see `pad_ranks`; offset: [K]; near: [K], 1 where M
    is near 1, for split; table: tiles of `tokens` tokens, see `tile_table`; order: [T] or None; exact:
    compute M with more than ten bits, which split needs where M - 1 is a difference of large numbers.
    """
    (features, summed), T = weight.shape, x.shape[0]
    y = x.new_empty(T, features)
    uses_tma = can_use_tma(x, weight, order) and tma_aligned(x, weight)
    transposed = weight.stride(1) != 1
    tiles = matmul_tiles(x.dtype, left.shape[2], uses_tma=uses_tma, split=split)
    x_argument: Any = x
    weight_argument: Any = weight
    if uses_tma:
        x_argument = TensorDescriptor.from_tensor(x, [tokens, tiles.summed])
        stored, tile = (
            (weight.T, [tiles.summed, tiles.features])
            if transposed
            else (weight, [tiles.features, tiles.summed])
        )
        weight_argument = TensorDescriptor.from_tensor(stored, tile)
    constants = matmul_constants(x.dtype, left.shape[2])
    with torch.cuda.device_of(x):
        _modulated_matmul[(len(table) * triton.cdiv(features, tiles.features),)](
            x_argument, weight_argument, left, right, offset, near, table, any_order(order, table), y,
            features, summed, len(table),
            x.stride(0), *weight.stride(), y.stride(0),
            TOKENS=tokens, FEATURES=tiles.features, SUMMED=tiles.summed, GROUP=GROUP,
            SPLIT=split, ORDERED=order is not None, USES_TMA=uses_tma, TRANSPOSED=transposed,
            M_PRECISION="tf32x3" if exact else constants["PRECISION"],
            num_warps=tiles.warps, num_stages=tiles.stages, **constants,
        )  # fmt: skip
    return y
