"""fLoRA in Triton: W0 * M is formed a tile at a time, in registers, and never exists as a whole.

All adapters of the batch run in one launch each for y and dX (flora_matmul_triton.py) and dA/dB (flora_gradient_triton.py). A
table on the device says which tokens of which segment a program takes; its length depends on the numbers of tokens and segments
alone, so that nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flora_train.kernels.flora.materialised import near_one
from flora_train.kernels.flora.triton_gradient import adapter_gradients
from flora_train.kernels.flora.triton_matmul import modulated_matmul
from flora_train.kernels.flora.triton_tiles import block_tokens, compute_capability, describable
from flora_train.kernels.ia3.triton_kernels import FusedScale
from flora_train.kernels.segments import Segments, per_segment
from flora_train.kernels.triton_common import block_table, by_feature, like, rank_table


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
    exact: bool,
) -> Tensor:
    """x [T, in], weight [out, in], A [K, r, in], B [K, out, r], offset [K], bounds [K + 1] int32, blocks [n, 3] int32 (see
    `block_table`) of `tokens` tokens, ranks [K] int32, order [T] or None; exact: see `modulated_matmul` -> [T, out]."""
    left, right = by_feature(B, ranks, dim=2), by_feature(A, ranks, dim=1)
    near = _near(left, right, offset, split)
    return modulated_matmul(x.contiguous(), weight.contiguous(), left, right, offset, near, blocks, order, tokens, split, exact)


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
    left, right = by_feature(B, ranks, dim=2), by_feature(A, ranks, dim=1)
    dx, d_right, d_left = _backward(dy, x.contiguous(), weight.contiguous(), left, right, offset, bounds, blocks, order, tokens)
    return dx, *_factors(d_right, d_left, A.shape[1], A.dtype, B.dtype)


@flora_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@flora_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), like(A), like(B)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tokens, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _compiled_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dA, dB = flora_backward_op(dy, *ctx.saved_tensors, ctx.tokens)
    return dx, None, dA, dB, *[None] * 8


flora_op.register_autograd(_compiled_backward, setup_context=_save)


class _Flora(torch.autograd.Function):
    """What flora_op does, without the dispatch that torch.compile needs: it takes Python longer than some layers take the GPU."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, A, B, offset, bounds, blocks, ranks, order, tokens, split, exact = inputs
        x, weight = x.contiguous(), weight.contiguous()
        left, right = by_feature(B, ranks, dim=2), by_feature(A, ranks, dim=1)
        ctx.save_for_backward(x, weight, left, right, offset, bounds, blocks, order)
        ctx.tokens, ctx.rank, ctx.dtypes = tokens, A.shape[1], (A.dtype, B.dtype)
        near = _near(left, right, offset, split)
        return modulated_matmul(x, weight, left, right, offset, near, blocks, order, tokens, split, exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, right, offset, bounds, blocks, order = ctx.saved_tensors
        dx, d_right, d_left = _backward(dy, x, weight, left, right, offset, bounds, blocks, order, ctx.tokens)
        return dx, None, *_factors(d_right, d_left, ctx.rank, *ctx.dtypes), *[None] * 8


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    offset: Tensor,
    bounds: Tensor,
    blocks: Tensor,
    order: Tensor | None,
    tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and what flora_gradient_triton.py makes of right and left."""
    dy = dy.contiguous()
    dx = modulated_matmul(dy, weight.T, right, left, offset, offset, blocks, order, tokens, split=False)
    return dx, *adapter_gradients(dy, x, weight, left, right, bounds, order)


def _near(left: Tensor, right: Tensor, offset: Tensor, split: bool) -> Tensor:
    """`near_one` of left [K, out, RANK] and right [K, in, RANK], float32 [K], found on the device; any numbers where it is not used."""
    return near_one(right.mT, left, offset).float() if split else offset


def _factors(d_right: Tensor, d_left: Tensor, rank: int, of_A: torch.dtype, of_B: torch.dtype) -> tuple[Tensor, Tensor]:
    """dA [K, rank, in] and dB [K, out, rank] from [K, features, RANK]."""
    return d_right[:, :, :rank].mT.to(of_A).contiguous(), d_left[:, :, :rank].to(of_B).contiguous()


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
        described = describable(x, weight, order)
        tokens = block_tokens(segments, x.dtype, A.shape[1], compute_capability(x.device), described)
        bounds, blocks = block_table(segments, x.device, tokens)
        ranks = rank_table(segments, A.shape[1], x.device)
        shift = per_segment(offset, A).view(-1).float()
        exact = split and not all(number == 1.0 for number in offset)
        op = flora_op if torch.compiler.is_compiling() else _Flora.apply
        return op(x, weight, A, B, shift, bounds, blocks, ranks, order, tokens, split, exact)


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
