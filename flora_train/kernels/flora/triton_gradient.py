"""dA and dB of fLoRA in Triton.

P = W0 * (dY^T X) of a segment is formed a tile at a time and never stored: its contributions to dB = P A^T
and dA = B^T P are added at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flora_train.kernels.flora.triton_tiles import can_use_tma, gradient_grid, gradient_tiles, tma_aligned
from flora_train.kernels.triton_common import any_order, matmul_constants, token_index


@triton.jit
def _load_tokens(
    tensor, first, column, end, order, features,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    ORDERED: tl.constexpr, USES_TMA: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """[TOKENS, WIDTH] from token `first` of a segment that ends at `end`, and from `column`; zeros beyond.

    SHORT: the segment may end within the tile.
    """
    token_mask = first + tl.arange(0, TOKENS) < end
    if USES_TMA:
        tile = tensor.load([first, column])
        if SHORT:
            tile = tl.where(token_mask[:, None], tile, tl.zeros_like(tile))
    else:
        t = token_index(first + tl.arange(0, TOKENS), token_mask, order, ORDERED)
        c = column + tl.arange(0, WIDTH)
        mask = token_mask[:, None] & (c[None, :] < features)
        tile = tl.load(tensor + t[:, None] * features + c[None, :], mask=mask, other=0.0)
    return tile


@triton.jit(do_not_specialize=["first_column"])
def _adapter_gradients(
    x, dy, weight, left, right, bounds, order, dA, dB,
    in_features, out_features, K, first_column, out_tiles,
    RANK: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, ADD: tl.constexpr,
    ORDERED: tl.constexpr, USES_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes out_tiles tiles [OUTS, INS] of P of one segment, all in one column.

    left [K, out, RANK] and right [K, in, RANK] in the dtype of x. dA [parts of rows, K, in, RANK] is summed
    over the tiles in registers; dB [columns at a time, K, out, RANK] is stored, or with ADD added to the
    result of the previous launch.
    """
    column, out_part, k = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, end = tl.load(bounds + k), tl.load(bounds + k + 1)
    whole = start + (end - start) // TOKENS * TOKENS
    left += k * out_features * RANK
    right += k * in_features * RANK
    dA += (out_part * K + k) * in_features * RANK
    dB += (column.to(tl.int64) * K + k) * out_features * RANK
    j = tl.arange(0, RANK)
    i0 = (first_column + column) * INS
    i = i0 + tl.arange(0, INS)
    of_right = i[:, None] * RANK + j[None, :]
    right_tile = tl.load(right + of_right, mask=i[:, None] < in_features, other=0.0)
    dA_tile = tl.zeros((INS, RANK), tl.float32)
    for row in range(out_tiles):
        o0 = (tl.program_id(1) * out_tiles + row) * OUTS
        o = o0 + tl.arange(0, OUTS)
        G = tl.zeros((OUTS, INS), tl.float32)
        for first in range(start, whole, TOKENS):
            dy_tile = _load_tokens(
                dy, first, o0, end, order, out_features, TOKENS, OUTS, ORDERED, USES_TMA, False
            )
            x_tile = _load_tokens(
                x, first, i0, end, order, in_features, TOKENS, INS, ORDERED, USES_TMA, False
            )
            G = tl.dot(dy_tile.T, x_tile, G, input_precision=PRECISION)
        if whole < end:
            dy_tile = _load_tokens(
                dy, whole, o0, end, order, out_features, TOKENS, OUTS, ORDERED, USES_TMA, True
            )
            x_tile = _load_tokens(x, whole, i0, end, order, in_features, TOKENS, INS, ORDERED, USES_TMA, True)
            G = tl.dot(dy_tile.T, x_tile, G, input_precision=PRECISION)
        if USES_TMA:
            w_tile = weight.load([o0, i0])
        else:
            inside = (o[:, None] < out_features) & (i[None, :] < in_features)
            w_tile = tl.load(weight + o[:, None] * in_features + i[None, :], mask=inside, other=0.0)
        P = (G * w_tile.to(tl.float32)).to(w_tile.dtype)
        of_left = o[:, None] * RANK + j[None, :]
        left_tile = tl.load(left + of_left, mask=o[:, None] < out_features, other=0.0)
        dB_tile = tl.dot(P, right_tile, input_precision=PRECISION)
        if ADD:
            # No other program adds to these addresses.
            tl.atomic_add(dB + of_left, dB_tile, mask=o[:, None] < out_features, sem="relaxed")
        else:
            tl.store(dB + of_left, dB_tile, mask=o[:, None] < out_features)
        dA_tile = tl.dot(P.T, left_tile, dA_tile, input_precision=PRECISION)
    tl.store(dA + of_right, dA_tile, mask=i[:, None] < in_features)


def adapter_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    left: Tensor,
    right: Tensor,
    bounds: Tensor,
    order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of right [K, in, RANK] and of left [K, out, RANK], float32.

    dy: [T, out]; x: [T, in]; weight: [out, in]; left, right: see `pad_ranks`; bounds: [K + 1]; order: [T] or
    None.
    """
    (K, out_features, _), in_features = left.shape, right.shape[1]
    left, right = left.to(x.dtype), right.to(x.dtype)
    uses_tma = can_use_tma(x, weight, order) and tma_aligned(x, dy, weight)
    tiles = gradient_tiles(x.dtype, left.shape[2], tokens_per_adapter=x.shape[0] / K, uses_tma=uses_tma)
    outs, ins = triton.cdiv(out_features, tiles.outs), triton.cdiv(in_features, tiles.ins)
    out_parts, columns = gradient_grid(K, outs, ins)
    d_right = x.new_empty(out_parts, *right.shape, dtype=torch.float32)
    d_left = x.new_empty(columns, *left.shape, dtype=torch.float32)
    x_argument: Any = x
    dy_argument: Any = dy
    weight_argument: Any = weight
    if uses_tma:
        x_argument = TensorDescriptor.from_tensor(x, [tiles.tokens, tiles.ins])
        dy_argument = TensorDescriptor.from_tensor(dy, [tiles.tokens, tiles.outs])
        weight_argument = TensorDescriptor.from_tensor(weight, [tiles.outs, tiles.ins])
    with torch.cuda.device_of(x):
        for first_column in range(0, ins, columns):
            _adapter_gradients[(min(columns, ins - first_column), out_parts, K)](
                x_argument, dy_argument, weight_argument, left, right, bounds, any_order(order, bounds),
                d_right, d_left,
                in_features, out_features, K, first_column, triton.cdiv(outs, out_parts),
                TOKENS=tiles.tokens, OUTS=tiles.outs, INS=tiles.ins,
                ADD=first_column > 0, ORDERED=order is not None,
                USES_TMA=uses_tma, num_warps=tiles.warps, num_stages=tiles.stages,
                **matmul_constants(x.dtype, left.shape[2]),
            )  # fmt: skip
    return d_right.sum(0), d_left.sum(0)
