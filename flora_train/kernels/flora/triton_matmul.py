"""y = x (W0 * M_k)^T in Triton, and dX, which is the same sum with the roles of A and B, and of W0 and its transpose, exchanged.

A tile of W0 * M is formed in registers, multiplied, and gone. On a Hopper GPU the copy engine fetches the tiles of x and W0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flora_train.kernels.flora.triton_tiles import aligned, describable, matmul_tiles
from flora_train.kernels.triton_common import matmul_constants, place


@triton.jit
def _modulated_matmul(
    x, weight, left, right, offset, near, blocks, order, y,
    features, summed, n_blocks,
    x_token, weight_feature, weight_summed, y_token,
    RANK: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, SUMMED: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, ORDERED: tl.constexpr, DESCRIBED: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, OF_M: tl.constexpr,
):  # fmt: skip
    """y[t, f] = sum_s x[t, s] weight[f, s] M[k, f, s], M = offset_k + sum_j left[k, f, j] right[k, s, j], for the tokens of one
    block. left [K, features, RANK], right [K, summed, RANK], float32.

    SPLIT: the sum of x weight and x (weight * (M - 1)) where near[k] is 1, which half precision needs for an M near 1, and of nothing and
    x (weight * M) where it is 0; OF_M: how exactly M is summed.
    DESCRIBED: x and weight are descriptors of such tiles, weight's as it lies in memory: [summed, features] if TRANSPOSED.
    """
    pid = tl.program_id(0)
    in_group = GROUP * tl.cdiv(features, FEATURES)  # blocks of tokens that meet in the cache, and with them the tiles of W0
    first_block = pid // in_group * GROUP
    group = tl.minimum(n_blocks - first_block, GROUP)
    block = first_block + pid % in_group % group
    k = tl.load(blocks + 3 * block).to(tl.int64)
    if k < 0:
        return
    first_token, first_feature = tl.load(blocks + 3 * block + 1), pid % in_group // group * FEATURES
    t = first_token + tl.arange(0, TOKENS)
    there = t < tl.load(blocks + 3 * block + 2)
    tokens = place(t, there, order, ORDERED)
    f = first_feature + tl.arange(0, FEATURES)
    j = tl.arange(0, RANK)
    left += k * features * RANK
    right += k * summed * RANK
    left_tile = tl.load(left + f[:, None] * RANK + j[None, :], mask=f[:, None] < features, other=0.0)
    shift = tl.load(offset + k)
    taken = tl.load(near + k)
    acc = tl.zeros((FEATURES, TOKENS), tl.float32)
    for first in range(0, summed, SUMMED):
        s = first + tl.arange(0, SUMMED)
        if DESCRIBED:
            x_columns = x.load([first_token, first]).T
            w_tile = weight.load([first, first_feature]).T if TRANSPOSED else weight.load([first_feature, first])
        else:
            x_columns = tl.load(
                x + tokens[:, None] * x_token + s[None, :], mask=there[:, None] & (s[None, :] < summed), other=0.0
            ).T
            w_tile = tl.load(
                weight + f[:, None] * weight_feature + s[None, :] * weight_summed,
                mask=(f[:, None] < features) & (s[None, :] < summed),
                other=0.0,
            )
        right_tile = tl.load(right + s[None, :] * RANK + j[:, None], mask=s[None, :] < summed, other=0.0)
        M = tl.dot(left_tile, right_tile, input_precision=OF_M) + shift
        if SPLIT:
            if taken > 0.5:
                acc = tl.dot(w_tile, x_columns, acc, input_precision=PRECISION)
            M -= taken
        acc = tl.dot((w_tile.to(tl.float32) * M).to(w_tile.dtype), x_columns, acc, input_precision=PRECISION)
    places = y + tokens[None, :] * y_token + f[:, None]
    tl.store(places, acc.to(y.dtype.element_ty), mask=there[None, :] & (f[:, None] < features))


GROUP = 8


def modulated_matmul(
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    offset: Tensor,
    near: Tensor,
    blocks: Tensor,
    order: Tensor | None,
    tokens: int,
    split: bool,
    exact: bool = False,
) -> Tensor:
    """x [T, summed], weight [features, summed] as it lies in memory, left [K, features, RANK] and right [K, summed, RANK] as
    `by_feature` lays them, offset and near (1 where M is near 1, for split) [K], blocks of `tokens` tokens -> y [T, features]. exact: M beyond ten bits, which split needs
    where M - 1 is a difference of large numbers."""
    (features, summed), T = weight.shape, x.shape[0]
    y = x.new_empty(T, features)
    described, transposed = describable(x, weight, order) and aligned(x, weight), weight.stride(1) != 1
    tiles = matmul_tiles(x.dtype, left.shape[2], described, split)
    of_x: Any = x
    of_weight: Any = weight
    if described:
        of_x = TensorDescriptor.from_tensor(x, [tokens, tiles.summed])
        stored, tile = (weight.T, [tiles.summed, tiles.features]) if transposed else (weight, [tiles.features, tiles.summed])
        of_weight = TensorDescriptor.from_tensor(stored, tile)
    constants = matmul_constants(x.dtype, left.shape[2])
    with torch.cuda.device_of(x):
        _modulated_matmul[(len(blocks) * triton.cdiv(features, tiles.features),)](
            of_x, of_weight, left, right, offset, near, blocks, blocks if order is None else order, y, features, summed, len(blocks),
            x.stride(0), *weight.stride(), y.stride(0),
            TOKENS=tokens, FEATURES=tiles.features, SUMMED=tiles.summed, GROUP=GROUP,
            SPLIT=split, ORDERED=order is not None, DESCRIBED=described, TRANSPOSED=transposed,
            OF_M="tf32x3" if exact else constants["PRECISION"], num_warps=tiles.warps, num_stages=tiles.stages, **constants,
        )  # fmt: skip
    return y
