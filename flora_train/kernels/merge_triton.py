"""Experts merged into the weights of many layers in one Triton launch: W = W0 + sum_e w_e B_e A_e, or
W = W0 * (1 + sum_e w_e B_e A_e).

W0 is read and never written, so that merging one route after the other does not drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flora_train.kernels.triton_common import matmul_constants

TILE_OUTS, TILE_INS = 32, 64
WARPS = 8
"""With fewer, the largest rank would not fit into the registers."""
FIELDS = 8
"""Numbers of a layer in the table: addresses of W0 and W, offsets of A and B, out, in, and W0's strides."""


@triton.jit
def _merge(
    tiles, layers, values, experts, factors, x,
    rank, chosen,
    FIELDS: tl.constexpr, RANK: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    MULTIPLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one layer. x: any tensor of the weights' type; factors: w_e times the scaling."""
    tile = tl.program_id(0)
    fields = layers + tl.load(tiles + 3 * tile).to(tl.int64) * FIELDS
    weight = tl.load(fields).to(tl.pointer_type(x.dtype.element_ty))
    merged = tl.load(fields + 1).to(tl.pointer_type(x.dtype.element_ty))
    A, B = values + tl.load(fields + 2), values + tl.load(fields + 3)
    outs, ins = tl.load(fields + 4), tl.load(fields + 5)
    o = (tl.load(tiles + 3 * tile + 1) + tl.arange(0, OUTS)).to(tl.int64)
    i = (tl.load(tiles + 3 * tile + 2) + tl.arange(0, INS)).to(tl.int64)
    j = tl.arange(0, RANK)
    mask = (o[:, None] < outs) & (i[None, :] < ins)
    place = o[:, None] * tl.load(fields + 6) + i[None, :] * tl.load(fields + 7)
    base = tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
    product = tl.zeros((OUTS, INS), tl.float32)
    for slot in range(chosen):
        expert = tl.load(experts + slot).to(tl.int64)
        left = tl.load(
            B + (expert * outs + o[:, None]) * rank + j[None, :],
            mask=(o[:, None] < outs) & (j[None, :] < rank),
            other=0.0,
        ).to(tl.float32)
        right = tl.load(
            A + (expert * rank + j[:, None]) * ins + i[None, :],
            mask=(j[:, None] < rank) & (i[None, :] < ins),
            other=0.0,
        ).to(tl.float32)
        left *= tl.load(factors + slot)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    if MULTIPLY:
        base *= 1.0 + product
    else:
        base += product
    tl.store(merged + o[:, None] * ins + i[None, :], base.to(x.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class MergedMatrix:
    """A weight, and where its merged form is written."""

    weight: Tensor
    """W0 [out, in], of any strides."""
    merged: Tensor
    """[out, in], contiguous, of W0's dtype."""
    A: int
    """Offset of the experts' A [E, r, in] in the adapter's values."""
    B: int
    """Offset of the experts' B [E, out, r]."""


class FusedMerge:
    """Merges the experts of a route into all of these layers, in one launch.

    The tables hold addresses of the tensors, which are kept alive. multiply: W0 * (1 + B A) in place of
    W0 + B A.
    """

    def __init__(self, matrices: Sequence[MergedMatrix], rank: int, *, multiply: bool) -> None:
        self.matrices, self.rank, self.multiply = tuple(matrices), rank, multiply
        first = matrices[0].weight
        if any(matrix.weight.dtype != first.dtype for matrix in matrices):
            raise ValueError("all weights must have the same dtype")
        rows: list[list[int]] = []
        tiles: list[tuple[int, int, int]] = []
        for number, matrix in enumerate(matrices):
            weight, (outs, ins) = matrix.weight, matrix.weight.shape
            if matrix.merged.shape != weight.shape or not matrix.merged.is_contiguous():
                raise ValueError(f"a merged weight must be contiguous and of shape {tuple(weight.shape)}")
            addresses = [weight.data_ptr(), matrix.merged.data_ptr()]
            rows.append([*addresses, matrix.A, matrix.B, outs, ins, *weight.stride()])
            for row in range(0, outs, TILE_OUTS):
                tiles += [(number, row, column) for column in range(0, ins, TILE_INS)]
        self._layers = torch.tensor(rows, dtype=torch.int64, device=first.device)
        self._tiles = torch.tensor(tiles, dtype=torch.int32, device=first.device)

    def __call__(self, values: Tensor, experts: Tensor, factors: Tensor) -> None:
        """values: [P] float32, the adapter's values; experts: int32 or int64 [k]; factors: float32 [k], what
        B_e A_e is multiplied by."""
        first = self.matrices[0].weight
        with torch.cuda.device_of(first):
            _merge[(len(self._tiles),)](
                self._tiles, self._layers, values, experts, factors, first,
                self.rank, len(experts),
                FIELDS=FIELDS, OUTS=TILE_OUTS, INS=TILE_INS, MULTIPLY=self.multiply, num_warps=WARPS,
                **matmul_constants(torch.float32, self.rank),
            )  # fmt: skip
