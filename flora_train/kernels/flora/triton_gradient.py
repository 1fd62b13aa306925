"""dA and dB of fLoRA in Triton. P = W0 * (dY^T X) of a segment is formed a tile at a time, and never exists as a whole: what it adds
to dB = P A^T and dA = B^T P is taken from it at once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flora_train.kernels.flora.triton_tiles import aligned, describable, gradient_tiles, parts
from flora_train.kernels.triton_common import matmul_constants, place


@triton.jit
def _tokens_of(tensor, first, column, end, order, features,
               TOKENS: tl.constexpr, WIDTH: tl.constexpr, ORDERED: tl.constexpr, DESCRIBED: tl.constexpr, SHORT: tl.constexpr):  # fmt: skip
    """Tokens `first` and on of a segment that ends at `end`, and WIDTH columns; zeros beyond. SHORT: it may end within them."""
    there = first + tl.arange(0, TOKENS) < end
    if DESCRIBED:
        tile = tensor.load([first, column])
        if SHORT:
            tile = tl.where(there[:, None], tile, tl.zeros_like(tile))
    else:
        t = place(first + tl.arange(0, TOKENS), there, order, ORDERED)
        c = column + tl.arange(0, WIDTH)
        mask = there[:, None] & (c[None, :] < features)
        tile = tl.load(tensor + t[:, None] * features + c[None, :], mask=mask, other=0.0)
    return tile


@triton.jit(do_not_specialize=["first_column"])
def _adapter_gradients(
    x, dy, weight, left, right, bounds, order, dA, dB,
    in_features, out_features, K, first_column, out_tiles,
    RANK: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, ADD: tl.constexpr,
    ORDERED: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes out_tiles tiles [OUTS, INS] of P of one segment, all of one column. left [K, out, RANK] and right [K, in,
    RANK] in the type of x. dA [parts of rows, K, in, RANK]: summed over the tiles in registers; dB [columns at a time, K, out,
    RANK]: stored, or with ADD added to what the launch before left there.
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
            dy_tile = _tokens_of(dy, first, o0, end, order, out_features, TOKENS, OUTS, ORDERED, DESCRIBED, False)
            x_tile = _tokens_of(x, first, i0, end, order, in_features, TOKENS, INS, ORDERED, DESCRIBED, False)
            G = tl.dot(dy_tile.T, x_tile, G, input_precision=PRECISION)
        if whole < end:
            dy_tile = _tokens_of(dy, whole, o0, end, order, out_features, TOKENS, OUTS, ORDERED, DESCRIBED, True)
            x_tile = _tokens_of(x, whole, i0, end, order, in_features, TOKENS, INS, ORDERED, DESCRIBED, True)
            G = tl.dot(dy_tile.T, x_tile, G, input_precision=PRECISION)
        if DESCRIBED:
            w_tile = weight.load([o0, i0])
        else:
            inside = (o[:, None] < out_features) & (i[None, :] < in_features)
            w_tile = tl.load(weight + o[:, None] * in_features + i[None, :], mask=inside, other=0.0)
        P = (G * w_tile.to(tl.float32)).to(w_tile.dtype)
        of_left = o[:, None] * RANK + j[None, :]
        left_tile = tl.load(left + of_left, mask=o[:, None] < out_features, other=0.0)
        dB_tile = tl.dot(P, right_tile, input_precision=PRECISION)
        if ADD:
            tl.atomic_add(dB + of_left, dB_tile, mask=o[:, None] < out_features, sem="relaxed")  # no other program adds here
        else:
            tl.store(dB + of_left, dB_tile, mask=o[:, None] < out_features)
        dA_tile = tl.dot(P.T, left_tile, dA_tile, input_precision=PRECISION)
    tl.store(dA + of_right, dA_tile, mask=i[:, None] < in_features)


def adapter_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, left: Tensor, right: Tensor, bounds: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dy [T, out], x [T, in], weight [out, in], left [K, out, RANK] and right [K, in, RANK] as `by_feature` lays them, bounds
    [K + 1] -> (of right [K, in, RANK], of left [K, out, RANK]), float32."""
    (K, out_features, _), in_features = left.shape, right.shape[1]
    left, right = left.to(x.dtype), right.to(x.dtype)
    described = describable(x, weight, order) and aligned(x, dy, weight)
    tiles = gradient_tiles(x.dtype, left.shape[2], x.shape[0] / K, described)
    outs, ins = triton.cdiv(out_features, tiles.outs), triton.cdiv(in_features, tiles.ins)
    out_parts, columns = parts(K, outs, ins)
    d_right = x.new_empty(out_parts, *right.shape, dtype=torch.float32)
    d_left = x.new_empty(columns, *left.shape, dtype=torch.float32)
    of_x: Any = x
    of_dy: Any = dy
    of_weight: Any = weight
    if described:
        of_x = TensorDescriptor.from_tensor(x, [tiles.tokens, tiles.ins])
        of_dy = TensorDescriptor.from_tensor(dy, [tiles.tokens, tiles.outs])
        of_weight = TensorDescriptor.from_tensor(weight, [tiles.outs, tiles.ins])
    with torch.cuda.device_of(x):
        for first_column in range(0, ins, columns):
            _adapter_gradients[(min(columns, ins - first_column), out_parts, K)](
                of_x, of_dy, of_weight, left, right, bounds, bounds if order is None else order, d_right, d_left,
                in_features, out_features, K, first_column, triton.cdiv(outs, out_parts),
                TOKENS=tiles.tokens, OUTS=tiles.outs, INS=tiles.ins, ADD=first_column > 0, ORDERED=order is not None,
                DESCRIBED=described, num_warps=tiles.warps, num_stages=tiles.stages,
                **matmul_constants(x.dtype, left.shape[2]),
            )  # fmt: skip
    return d_right.sum(0), d_left.sum(0)
