"""fLoRA in torch: two formulations with hand-written gradients (docs/math.md derives both).

Materialised: forms W0 * M of a segment in a buffer, one segment per thread. The gradients of all ranks come
from one dY^T X per segment, so that the cost does not grow with the rank. Rank-expanded: multiplies r scaled
copies of the tokens by W0, which reads W0 once for all adapters; faster for few tokens or rank 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import autocast_disabled
from flora_train.kernels.cpu_threads import SCRATCH, Job, division_for, run_jobs
from flora_train.kernels.segments import (
    Segments,
    expand_to_units,
    per_segment,
    per_unit,
    reduce_units,
    to_units,
)

BLOCK_BYTES = 2 << 20
"""Size of the part of W0 * M that is formed at a time: it should be in a core's cache when the matmul reads
it."""


class MaterialisedFlora(torch.autograd.Function):
    """y = x (W0 * M_k)^T per segment. Shapes and dtypes as `flora_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        offset: Sequence[float],
        segments: Segments,
        split: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.offset, ctx.segments = offset, segments
        ctx.near = [True] * len(segments)
        if _is_half(weight):
            ctx.near = near_one(A, B, per_segment(offset, A).view(-1)).tolist()
        y = x.new_empty(x.shape[0], weight.shape[0])
        # bfloat16(W0 * M) loses every modulation below 0.3 %. [x x] [W0 D]^T with D = W0 * (M - 1) preserves
        # it: the sum of both terms is rounded once, after the matmul's float32 accumulation. For an M near 0
        # it would be the difference of two large numbers, so that such an adapter is not split.
        doubled = torch.cat([x, x], dim=1) if split and any(ctx.near) else x
        # Thread -> the rows of W0 in the first half of its pair.
        filled: dict[int, tuple[int, int]] = {}

        def work(job: Job) -> None:
            is_split = split and ctx.near[job.k]
            tokens = (doubled if is_split else x)[job.start : job.end]
            A_k = A[job.k]
            for rows in _row_ranges(job, weight):
                W, B_k = weight[slice(*rows)], B[job.k, slice(*rows)]
                if is_split:
                    modulated = SCRATCH.matrix("pair", (len(W), 2 * weight.shape[1]), weight)
                    if filled.get(get_ident()) != rows:
                        modulated[:, : weight.shape[1]].copy_(W)
                        filled[get_ident()] = rows
                    deviation = modulated[:, weight.shape[1] :]
                    _deviation(W, A_k, B_k, offset=offset[job.k], subtracted=1.0, out=deviation)
                else:
                    modulated = _modulated(W, A_k, B_k, offset=offset[job.k], near=ctx.near[job.k])
                torch.mm(tokens, modulated.T, out=y[job.start : job.end, slice(*rows)])

        run_jobs(division_for(segments, x.device), work)
        return y

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        need_dx, need_dAB = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        dy = dy.contiguous()
        division = division_for(ctx.segments, x.device)
        # dx and dA are sums over the parts of a segment: each part has a slice of its own.
        dx = x.new_empty(division.parts, *x.shape) if need_dx else None
        dA = A.new_zeros(division.parts, *A.shape) if need_dAB else None
        # [K, r, out], because a matmul with few rows is faster than one with few columns.
        dB = B.new_zeros(len(B), B.shape[2], B.shape[1]) if need_dAB else None

        def work(job: Job) -> None:
            A_k, x_k, dy_job = A[job.k], x[job.start : job.end], dy[job.start : job.end]
            dx_k = None if dx is None else dx[job.part, job.start : job.end]
            beta = 0.0
            for rows in _row_ranges(job, weight, summed=True):
                W, B_k, dy_k = weight[slice(*rows)], B[job.k, slice(*rows)], dy_job[:, slice(*rows)]
                if dx_k is not None:
                    modulated = _modulated(W, A_k, B_k, offset=ctx.offset[job.k], near=ctx.near[job.k])
                    torch.addmm(dx_k, dy_k, modulated, beta=beta, out=dx_k)
                if dA is not None and dB is not None:
                    # P = W0 * (dY^T X); dB = P A^T; dA = B^T P: one matmul over tokens for any rank.
                    P = torch.mm(dy_k.T, x_k, out=SCRATCH.matrix("weight", (len(W), W.shape[1]), W)).mul_(W)
                    dB[job.k, :, slice(*rows)] = A_k.to(P.dtype) @ P.T
                    dA[job.part, job.k] += B_k.T.to(P.dtype) @ P
                beta = 1.0

        run_jobs(division, work)
        if dB is not None:
            dB = dB.transpose(1, 2)
        return _sum_parts(dx), None, _sum_parts(dA), dB, None, None, None


class RankExpandedFlora(torch.autograd.Function):
    """y = offset_k x W0^T + sum_j b_kj * ((a_kj * x) W0^T): one matmul over all ranks, segments and the
    offset.

    split: half precision cannot represent a_kj * x for an a_kj near a constant c_kj, such as the 1 with which
    pure adapters start. Therefore a_kj - c_kj is expanded, and x W0^T is scaled by g_k = offset_k + sum_j
    c_kj b_kj. Where M is near 1 (`near_one`), the 1 of g_k is computed separately: x W0^T is added to the
    rest by a matmul that rounds once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        offset: Sequence[float],
        segments: Segments,
        split: bool,
    ) -> Tensor:
        ctx.offset, ctx.segments = offset, segments
        forward = _forward_split if split else _forward
        y, z, constant = forward(x, weight, A, B, offset=offset, segments=segments)
        ctx.save_for_backward(x, weight, A, B, z, constant)
        return y

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, z, constant = ctx.saved_tensors
        rank, residual, segments = A.shape[1], any(ctx.offset), ctx.segments
        # The terms of a pure adapter cannot cancel x W0^T.
        constant = constant * per_segment(ctx.offset, A)
        units, dunits = to_units(x, segments), to_units(dy.contiguous(), segments)
        dz = dy.new_empty(rank + residual, *dunits.shape)
        torch.mul(dunits, _features_of_units(B.mT, segments), out=dz[:rank])
        if residual:
            scale = _scale_of_base(B, constant, ctx.offset)[:, None]
            torch.mul(dunits, expand_to_units(scale, segments), out=dz[rank])
        dexpanded = (dz.view(-1, dy.shape[1]) @ weight).view(*dz.shape[:-1], x.shape[1])
        dx = torch.sum(dexpanded[:rank] * _features_of_units(A - constant, segments), dim=0, dtype=x.dtype)
        if residual:
            dx += dexpanded[rank]
        dA_units = torch.sum(dexpanded[:rank] * units, dim=2, dtype=A.dtype).transpose(0, 1)
        dB_units = torch.sum(z * dunits, dim=2, dtype=B.dtype).transpose(0, 1)
        dA = reduce_units(dA_units, segments, A.dtype)
        dB = reduce_units(dB_units, segments, B.dtype).mT
        return dx.view(x.shape), None, dA, dB, None, None, None


def _forward(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *, offset: Sequence[float], segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, out], z [r, U, unit, out] = (a_kj * x) W0^T, and a constant part of 0, [K, r, 1]."""
    rank, residual = A.shape[1], any(offset)
    units = to_units(x, segments)
    expanded = x.new_empty(rank + residual, *units.shape)
    torch.mul(units, _features_of_units(A, segments), out=expanded[:rank])
    if residual:
        expanded[rank] = units
    z = (expanded.view(-1, x.shape[1]) @ weight.T).view(*expanded.shape[:-1], weight.shape[0])
    # A tensor of its own and not a view, because a model may add to it in place.
    y = x.new_empty(x.shape[0], weight.shape[0])
    y_units = y.view(z.shape[1:])
    torch.sum(z[:rank] * _features_of_units(B.mT, segments), dim=0, dtype=x.dtype, out=y_units)
    if residual:
        y_units.add_(z[rank] * per_unit(offset, segments, x))
    return y, z[:rank], A.new_zeros(len(A), rank, 1)


def _forward_split(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *, offset: Sequence[float], segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, out], z [r, U, unit, out] = (a_kj * x) W0^T, and the constant parts c_kj [K, r, 1] of a_kj."""
    rank = A.shape[1]
    constant = _constant_part(A)
    near: list[bool] = []
    is_scaled = False
    # On a GPU, reading `near` would wait for the device; x W0^T is computed in float32 instead.
    if not x.is_cuda:
        near = near_one(A, B, per_segment(offset, A).view(-1)).tolist()
        is_scaled = bool(constant.any()) or not (all(offset) and all(near))
    units = to_units(x, segments)
    expanded = x.new_empty(rank + is_scaled, *units.shape)
    torch.mul(units, _features_of_units(A - constant, segments), out=expanded[:rank])
    if is_scaled:
        expanded[rank] = units
    z = (expanded.view(-1, x.shape[1]) @ weight.T).view(*expanded.shape[:-1], weight.shape[0])
    y = x.new_empty(x.shape[0], weight.shape[0])
    scale = _scale_of_base(B, constant, offset)
    base: Tensor | None = None
    if x.is_cuda:
        base = torch.mm(x, weight.T, out_dtype=torch.float32).view(z.shape[1:])
    else:
        scale = scale - torch.tensor(near, dtype=scale.dtype)[:, None]
        if is_scaled:
            base = z[rank]
    added = torch.sum(z[:rank] * _features_of_units(B.mT, segments), dim=0, dtype=scale.dtype)
    if base is not None:
        added.add_(base * expand_to_units(scale[:, None], segments))
        z[:rank] += base * _features_of_units(constant, segments)
    y.view(z.shape[1:]).copy_(added)
    if any(near):
        tokens = x
        if not all(near):
            tokens = (units * per_unit([float(is_near) for is_near in near], segments, x)).view_as(x)
        y.addmm_(tokens, weight.T)
    return y, z[:rank], constant


def _constant_part(A: Tensor) -> Tensor:
    """[K, r, in] -> [K, r, 1]: the mean of each a_kj that is mostly constant along the features, and 0 for
    the others."""
    mean, square = A.mean(2, keepdim=True), A.square().mean(2, keepdim=True)
    return torch.where((mean.square() > 0.5 * square) & square.isfinite(), mean, 0.0)


def _scale_of_base(B: Tensor, constant: Tensor, offset: Sequence[float]) -> Tensor:
    """[K, out]: offset_k + sum_j c_kj b_kj."""
    # Not multiplied where c_kj is 0: an infinite b_kj must not affect the other ranks.
    terms = torch.where(constant.mT != 0, B * constant.mT, 0.0)
    return terms.sum(2) + per_segment(offset, B)[:, 0]


def _features_of_units(factors: Tensor, segments: Segments) -> Tensor:
    """[K, r, features] -> [r, U, 1, features]."""
    return expand_to_units(factors, segments).transpose(0, 1)[:, :, None]


def _is_half(weight: Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16)


def _row_ranges(job: Job, weight: Tensor, summed: bool = False) -> Iterator[tuple[int, int]]:
    """The job's output features in ranges whose part of W0 [out, in] fits into BLOCK_BYTES.

    summed: a result is summed over the ranges. In half precision there is then one range, because every sum
    would be rounded.
    """
    first, last = job.rows(weight.shape[0])
    size = max(1, BLOCK_BYTES // (weight.shape[1] * weight.element_size()))
    count = 1 if summed and _is_half(weight) else -(-(last - first) // size)
    for i in range(count):
        yield first + (last - first) * i // count, first + (last - first) * (i + 1) // count


def _sum_parts(parts: Tensor | None) -> Tensor | None:
    if parts is None:
        return None
    return parts[0] if len(parts) == 1 else parts.sum(0)


def near_one(A: Tensor, B: Tensor, offset: Tensor) -> Tensor:
    """Whether the mean of M_k = offset_k + B_k A_k is above 1/2, bool [K]. A: [K, r, in], B: [K, out, r],
    offset: [K].

    Then the mean square of M - 1 is at most that of M, and half precision loses least with W0 + W0 * (M - 1);
    otherwise with W0 * M. True for an adapter that is not finite.
    """
    mean = (B.mean(1) * A.mean(2)).sum(1) + offset
    return (mean > 0.5) | ~mean.isfinite()


def _modulated(weight: Tensor, A: Tensor, B: Tensor, *, offset: float, near: bool) -> Tensor:
    """W0 * (offset + B A) in a buffer of this thread, [out, in]; B A is formed in A's dtype (float32
    masters).

    near: see `near_one`.
    """
    out = SCRATCH.matrix("weight", (len(weight), weight.shape[1]), weight)
    if _is_half(weight):
        deviation = _deviation(weight, A, B, offset=offset, subtracted=float(near), out=out)
        return deviation.add_(weight) if near else deviation
    product = torch.mm(B, A, out=out)
    if offset:
        product.add_(offset)
    return product.mul_(weight)


def _deviation(
    weight: Tensor, A: Tensor, B: Tensor, *, offset: float, subtracted: float, out: Tensor
) -> Tensor:
    """W0 * (M - subtracted) into `out` [out, in] of the weight's half dtype; M - subtracted is formed in A's
    dtype."""
    deviation = torch.mm(B, A, out=SCRATCH.matrix("product", (len(weight), weight.shape[1]), A))
    if offset != subtracted:
        deviation.add_(offset - subtracted)
    return out.copy_(deviation).mul_(weight)
