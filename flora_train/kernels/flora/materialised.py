"""fLoRA in torch: two formulations with hand-written gradients (docs/math.md derives both).

Materialise forms W0 * M of a segment in a scratch buffer, a segment a thread; all ranks' gradients come from one
dY^T X per segment, so the cost does not grow with the rank. Rank expansion runs r scaled copies of the tokens
through W0, which reads W0 once for all adapters: right for few tokens or rank 1.
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
from flora_train.kernels.segments import Segments, from_rows, in_rows, per_row, per_segment, to_rows


class MaterialisedFlora(torch.autograd.Function):
    """y = x (W0 * M_k)^T per segment. Shapes and dtypes as `flora_linear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, offset: Sequence[float], segments: Segments, split: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.offset, ctx.segments = offset, segments
        ctx.near = near_one(A, B, per_segment(offset, A).view(-1)).tolist() if _is_half(weight) else [True] * len(segments)
        y = x.new_empty(x.shape[0], weight.shape[0])
        # bfloat16(W0 * M) loses every modulation below 0.3 %. [x x] [W0 D]^T with D = W0 * (M - 1) keeps it: the sum of
        # both terms is rounded once, after the matmul's float32 accumulation. Of an M near 0 it would be the difference of
        # two large numbers: such an adapter is formed whole.
        tokens = torch.cat([x, x], dim=1) if split and any(ctx.near) else x

        filled: dict[int, tuple[int, int]] = {}  # thread -> the rows of W0 in its pair

        def work(job: Job) -> None:
            apart = split and ctx.near[job.k]
            tokens_k, A_k = (tokens if apart else x)[job.start : job.end], A[job.k]
            for rows in _blocks(job, weight):
                W, B_k = weight[slice(*rows)], B[job.k, slice(*rows)]
                if apart:
                    modulated = SCRATCH.matrix("pair", (len(W), 2 * weight.shape[1]), weight)
                    if filled.get(get_ident()) != rows:
                        modulated[:, : weight.shape[1]].copy_(W)
                        filled[get_ident()] = rows
                    _deviation(W, A_k, B_k, offset[job.k], modulated[:, weight.shape[1] :], taken=1.0)
                else:
                    modulated = _modulated(W, A_k, B_k, offset[job.k], ctx.near[job.k])
                torch.mm(tokens_k, modulated.T, out=y[job.start : job.end, slice(*rows)])

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
        # what parts of a segment have to be summed over, each in a slice of its own
        dx = x.new_empty(division.parts, *x.shape) if need_dx else None
        dA = A.new_zeros(division.parts, *A.shape) if need_dAB else None
        dB = B.new_zeros(len(B), B.shape[2], B.shape[1]) if need_dAB else None  # [K, r, out]: a thin matmul is faster lying down

        def work(job: Job) -> None:
            A_k, x_k, dy_job = A[job.k], x[job.start : job.end], dy[job.start : job.end]
            dx_k = None if dx is None else dx[job.part, job.start : job.end]
            begun = False
            for rows in _blocks(job, weight, summed=True):
                W, B_k, dy_k = weight[slice(*rows)], B[job.k, slice(*rows)], dy_job[:, slice(*rows)]
                if dx_k is not None:
                    torch.addmm(
                        dx_k, dy_k, _modulated(W, A_k, B_k, ctx.offset[job.k], ctx.near[job.k]), beta=float(begun), out=dx_k
                    )
                if dA is not None and dB is not None:
                    # P = W0 * (dY^T X); dB = P A^T; dA = B^T P: one matmul over tokens whatever the rank.
                    P = torch.mm(dy_k.T, x_k, out=SCRATCH.matrix("weight", (len(W), W.shape[1]), W)).mul_(W)
                    dB[job.k, :, slice(*rows)] = A_k.to(P.dtype) @ P.T
                    dA[job.part, job.k] += B_k.T.to(P.dtype) @ P
                begun = True

        run_jobs(division, work)
        return _summed(dx), None, _summed(dA), dB if dB is None else dB.transpose(1, 2), None, None, None


class RankExpandedFlora(torch.autograd.Function):
    """y = offset_k x W0^T + sum_j b_kj * ((a_kj * x) W0^T): one matmul over all ranks, segments and the offset.

    split: half precision cannot hold a_kj * x for an a_kj near a constant c_kj, such as the 1 where pure adapters start. So
    a_kj - c_kj is expanded, and x W0^T is scaled by g_k = offset_k + sum_j c_kj b_kj, of which 1 is taken where M is near it
    (`near_one`): x W0^T on top of the rest, in a matmul that rounds once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, offset: Sequence[float], segments: Segments, split: bool
    ) -> Tensor:
        rank = A.shape[1]
        constant = _constant_part(A) if split else A.new_zeros(len(A), rank, 1)
        near = near_one(A, B, per_segment(offset, A).view(-1)).tolist() if split and not x.is_cuda else []
        of_base = any(offset) if not split else not x.is_cuda and not (all(offset) and all(near) and not constant.any())
        rows = in_rows(x, segments)
        expanded = x.new_empty(rank + of_base, *rows.shape)
        torch.mul(rows, _features_of_rows(A - constant if split else A, segments), out=expanded[:rank])
        if of_base:
            expanded[rank] = rows
        z = (expanded.view(-1, x.shape[1]) @ weight.T).view(*expanded.shape[:-1], weight.shape[0])
        y = x.new_empty(x.shape[0], weight.shape[0])  # not a view of something: a model may add to it in place
        by_rows = y.view(z.shape[1:])
        if split:
            scale = _scale_of_base(B, constant, offset)
            base: Tensor | None
            if x.is_cuda:  # which gives x W0^T in float32
                base = torch.mm(x, weight.T, out_dtype=torch.float32).view(z.shape[1:])
            else:
                base = z[rank] if of_base else None
                scale = scale - torch.tensor(near, dtype=scale.dtype)[:, None]
            added = torch.sum(z[:rank] * _features_of_rows(B.mT, segments), dim=0, dtype=scale.dtype)
            if base is not None:
                added.add_(base * to_rows(scale[:, None], segments))
                z[:rank] += base * _features_of_rows(constant, segments)
            by_rows.copy_(added)
            if any(near):
                taken = x if all(near) else (rows * per_row([float(one) for one in near], segments, x)).view_as(x)
                y.addmm_(taken, weight.T)
        else:
            torch.sum(z[:rank] * _features_of_rows(B.mT, segments), dim=0, dtype=x.dtype, out=by_rows)
            if of_base:
                by_rows.add_(z[rank] * per_row(offset, segments, x))
        ctx.save_for_backward(x, weight, A, B, z[:rank], constant)
        ctx.offset, ctx.segments = offset, segments
        return y

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, z, constant = ctx.saved_tensors
        rank, residual, segments = A.shape[1], any(ctx.offset), ctx.segments
        constant = constant * per_segment(ctx.offset, A)  # a pure adapter's terms cannot cancel x W0^T
        rows, drows = in_rows(x, segments), in_rows(dy.contiguous(), segments)
        dz = dy.new_empty(rank + residual, *drows.shape)
        torch.mul(drows, _features_of_rows(B.mT, segments), out=dz[:rank])
        if residual:
            torch.mul(drows, to_rows(_scale_of_base(B, constant, ctx.offset)[:, None], segments), out=dz[rank])
        dexpanded = (dz.view(-1, dy.shape[1]) @ weight).view(*dz.shape[:-1], x.shape[1])
        dx = torch.sum(dexpanded[:rank] * _features_of_rows(A - constant, segments), dim=0, dtype=x.dtype)
        if residual:
            dx += dexpanded[rank]
        dA = from_rows(torch.sum(dexpanded[:rank] * rows, dim=2, dtype=A.dtype).transpose(0, 1), segments, A.dtype)
        dB = from_rows(torch.sum(z * drows, dim=2, dtype=B.dtype).transpose(0, 1), segments, B.dtype).mT
        return dx.view(x.shape), None, dA, dB, None, None, None


def _constant_part(A: Tensor) -> Tensor:
    """[K, r, in] -> [K, r, 1]: the mean of each a_kj that is mostly constant along the features, and 0 for others."""
    mean, square = A.mean(2, keepdim=True), A.square().mean(2, keepdim=True)
    return torch.where((mean.square() > 0.5 * square) & square.isfinite(), mean, 0.0)


def _scale_of_base(B: Tensor, constant: Tensor, offset: Sequence[float]) -> Tensor:
    """[K, out]: offset_k + sum_j c_kj b_kj."""
    terms = torch.where(constant.mT != 0, B * constant.mT, 0.0)  # what is not finite must not reach others
    return terms.sum(2) + per_segment(offset, B)[:, 0]


def _features_of_rows(factors: Tensor, segments: Segments) -> Tensor:
    """[K, r, features] -> [r, rows, 1, features]."""
    return to_rows(factors, segments).transpose(0, 1)[:, :, None]


def _is_half(weight: Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16)


BLOCK_BYTES = 2 << 20
"""Of W0 * M that is formed at one time: it should still be in a core's cache when the matmul reads it."""


def _blocks(job: Job, weight: Tensor, summed: bool = False) -> Iterator[tuple[int, int]]:
    """The job's output features in ranges whose part of W0 [out, in] fits into BLOCK_BYTES. In half precision a result that
    is summed over them is computed in one: it would be rounded at every sum."""
    first, last = job.rows(weight.shape[0])
    size = max(1, BLOCK_BYTES // (weight.shape[1] * weight.element_size()))
    count = 1 if summed and _is_half(weight) else -(-(last - first) // size)
    for i in range(count):
        yield first + (last - first) * i // count, first + (last - first) * (i + 1) // count


def _summed(parts: Tensor | None) -> Tensor | None:
    return parts if parts is None else parts[0] if len(parts) == 1 else parts.sum(0)


def near_one(A: Tensor, B: Tensor, offset: Tensor) -> Tensor:
    """Whether the mean of M_k = offset_k + B_k A_k is above 1/2, for every adapter of A [K, r, in], B [K, out, r] and offset [K]: bool [K]. Then the mean square of M - 1 is at most that
    of M, and half precision loses least of W0 + W0 * (M - 1); else of W0 * M. An adapter that is not finite is called near."""
    mean = (B.mean(1) * A.mean(2)).sum(1) + offset
    return (mean > 0.5) | ~mean.isfinite()


def _modulated(weight: Tensor, A: Tensor, B: Tensor, offset: float, near: bool) -> Tensor:
    """W0 * (offset + B A) in this thread's scratch, [out, in]; the product is formed in A's dtype (float32 masters). near: see near_one."""
    out = SCRATCH.matrix("weight", (len(weight), weight.shape[1]), weight)
    if _is_half(weight):
        return _deviation(weight, A, B, offset, out, 1.0).add_(weight) if near else _deviation(weight, A, B, offset, out, 0.0)
    product = torch.mm(B, A, out=out)
    if offset:
        product.add_(offset)
    return product.mul_(weight)


def _deviation(weight: Tensor, A: Tensor, B: Tensor, offset: float, out: Tensor, taken: float) -> Tensor:
    """W0 * (M - taken) into `out` [out, in] of the weight's half type; M - taken is formed in A's dtype."""
    deviation = torch.mm(B, A, out=SCRATCH.matrix("product", (len(weight), weight.shape[1]), A))
    if offset != taken:
        deviation.add_(offset - taken)
    return out.copy_(deviation).mul_(weight)
