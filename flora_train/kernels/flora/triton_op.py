"""fLoRA in Triton: W0 * M is formed a tile at a time, in registers, and never stored.

One launch each computes y and dX (triton_matmul.py) and dA and dB (triton_gradient.py) of all adapters of the
batch. A table on the device maps programs to tokens and segments; its size depends only on the numbers of
tokens and segments, so that nothing waits for the device.
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
from flora_train.kernels.flora.triton_tiles import can_use_tma, compute_capability, tile_tokens
from flora_train.kernels.ia3.triton_kernels import FusedScale
from flora_train.kernels.segments import Segments, per_segment
from flora_train.kernels.triton_common import empty_contiguous, pad_ranks, tile_table


@torch.library.custom_op("flora_train::flora", mutates_args=())
def flora_op(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offset: Tensor,
    bounds: Tensor,
    table: Tensor,
    order: Tensor | None,
    tokens: int,
    split: bool,
    exact: bool,
) -> Tensor:
    """y [T, out] for x [T, in], weight [out, in], A [K, r, in], B [K, out, r] and offset [K].

    bounds [K + 1] and table [n, 3] int32: see `tile_table`, for tiles of `tokens` tokens; order: [T] or None;
    exact: see `modulated_matmul`.
    """
    y, _, _ = _forward(x.contiguous(), weight.contiguous(), A, B, offset, table, order, tokens, split, exact)
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
    table: Tensor,
    order: Tensor | None,
    tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB), of the shapes and dtypes of x, A and B."""
    left, right = pad_ranks(B, dim=2), pad_ranks(A, dim=1)
    saved = (x.contiguous(), weight.contiguous(), left, right, offset, bounds, table, order)
    dx, d_right, d_left = _backward(dy, saved, tokens)
    return dx, *_factor_gradients(d_right, d_left, A.shape[1], dtypes=(A.dtype, B.dtype))


@flora_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@flora_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_contiguous(x), empty_contiguous(A), empty_contiguous(B)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tokens, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _compiled_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dA, dB = flora_backward_op(dy, *ctx.saved_tensors, ctx.tokens)
    return dx, None, dA, dB, *[None] * 7


flora_op.register_autograd(_compiled_backward, setup_context=_save)


class _Flora(torch.autograd.Function):
    """`flora_op` without the dispatch that torch.compile needs, which takes longer than some layers on a
    GPU."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, A, B, offset, bounds, table, order, tokens, split, exact = inputs
        x, weight = x.contiguous(), weight.contiguous()
        y, left, right = _forward(x, weight, A, B, offset, table, order, tokens, split, exact)
        ctx.save_for_backward(x, weight, left, right, offset, bounds, table, order)
        ctx.tokens, ctx.rank, ctx.dtypes = tokens, A.shape[1], (A.dtype, B.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, d_right, d_left = _backward(dy, ctx.saved_tensors, ctx.tokens)
        dA, dB = _factor_gradients(d_right, d_left, ctx.rank, dtypes=ctx.dtypes)
        return dx, None, dA, dB, *[None] * 7


def _forward(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offset: Tensor,
    table: Tensor,
    order: Tensor | None,
    tokens: int,
    split: bool,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the padded factors left [K, out, RANK] and right [K, in, RANK]. Arguments as `flora_op`."""
    left, right = pad_ranks(B, dim=2), pad_ranks(A, dim=1)
    # Computed on the device. Without split, its values are not used.
    near = near_one(right.mT, left, offset).float() if split else offset
    y = modulated_matmul(
        x,
        weight,
        left,
        right,
        offset=offset,
        near=near,
        table=table,
        order=order,
        tokens=tokens,
        split=split,
        exact=exact,
    )
    return y, left, right


def _backward(dy: Tensor, saved: tuple[Any, ...], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and the gradients of right and left. saved: x, weight, left, right, offset, bounds, table,
    order."""
    x, weight, left, right, offset, bounds, table, order = saved
    dy = dy.contiguous()
    dx = modulated_matmul(
        dy,
        weight.T,
        right,
        left,
        offset=offset,
        near=offset,
        table=table,
        order=order,
        tokens=tokens,
        split=False,
    )
    return dx, *adapter_gradients(dy, x, weight, left=left, right=right, bounds=bounds, order=order)


def _factor_gradients(
    d_right: Tensor, d_left: Tensor, rank: int, *, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor]:
    """dA [K, rank, in] and dB [K, out, rank] from [K, features, RANK]. dtypes: of A and B."""
    A_dtype, B_dtype = dtypes
    return d_right[:, :, :rank].mT.to(A_dtype).contiguous(), d_left[:, :, :rank].to(B_dtype).contiguous()


class FusedFlora:
    """y = x (W0 * M_k)^T per segment. Shapes and dtypes as `flora_linear`, except float64."""

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
        capability, uses_tma = compute_capability(x.device), can_use_tma(x, weight, order)
        tokens = tile_tokens(segments, x.dtype, A.shape[1], capability=capability, uses_tma=uses_tma)
        bounds, table = tile_table(segments, x.device, tokens)
        shift = per_segment(offset, A).view(-1).float()
        exact = split and not all(number == 1.0 for number in offset)
        op = flora_op if torch.compiler.is_compiling() else _Flora.apply
        return op(x, weight, A, B, shift, bounds, table, order, tokens, split, exact)


class ScaledFlora:
    """Pure fLoRA of rank 1, y = b_k * ((a_k * x) W0^T) per segment.

    Between two scales, the tokens of all adapters are multiplied by W0 at once.
    """

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
            raise ValueError("ScaledFlora computes pure fLoRA of rank 1, not split")
        scaled = FusedScale.apply(x, A[:, 0], segments, order)
        return FusedScale.apply(F.linear(scaled, weight), B[:, :, 0], segments, order)
