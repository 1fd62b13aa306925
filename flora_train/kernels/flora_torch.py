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

from flora_train.kernels.autocast import as_written
from flora_train.kernels.segments import Segments, from_rows, in_rows, per_row, per_segment, to_rows
from flora_train.kernels.threads import SCRATCH, Job, division_for, run_jobs


class MaterialisedFlora(torch.autograd.Function):
    """y = x (W0 * M_k)^T per segment. Shapes and dtypes as `flora_linear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, offset: Sequence[float], segments: Segments, split: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.offset, ctx.segments = offset, segments
        y = x.new_empty(x.shape[0], weight.shape[0])
        # bfloat16(W0 * M) loses every modulation below 0.3 %. [x x] [W0 D]^T with D = W0 * (M - 1) keeps it: the sum of
        # both terms is rounded once, after the matmul's float32 accumulation.
        tokens = torch.cat([x, x], dim=1) if split else x

        filled: dict[int, tuple[int, int]] = {}  # thread -> the rows of W0 in its pair

        def work(job: Job) -> None:
            tokens_k, A_k = tokens[job.start : job.end], A[job.k]
            for rows in _blocks(job, weight):
                W, B_k = weight[slice(*rows)], B[job.k, slice(*rows)]
                if split:
                    modulated = SCRATCH.matrix("pair", (len(W), 2 * weight.shape[1]), weight)
                    if filled.get(get_ident()) != rows:
                        modulated[:, : weight.shape[1]].copy_(W)
                        filled[get_ident()] = rows
                    _deviation(W, A_k, B_k, offset[job.k], out=modulated[:, weight.shape[1] :])
                else:
                    modulated = _modulated(W, A_k, B_k, offset[job.k])
                torch.mm(tokens_k, modulated.T, out=y[job.start : job.end, slice(*rows)])

        run_jobs(division_for(segments, x.device), work)
        return y

    @staticmethod
    @once_differentiable
    @as_written
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
                    torch.addmm(dx_k, dy_k, _modulated(W, A_k, B_k, ctx.offset[job.k]), beta=float(begun), out=dx_k)
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

    split: what adapters add to x W0^T is summed first, and x W0^T on top of it in a matmul that rounds once. Pure ones add
    sum_j b_kj * ((a_kj - 1) * x) W0^T and (sum_j b_kj - 1) * x W0^T: half precision cannot hold a_kj * x for an a_kj near 1,
    where they start.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, offset: Sequence[float], segments: Segments, split: bool
    ) -> Tensor:
        rank = A.shape[1]
        taken = [1.0 - number if split else 0.0 for number in offset]  # off every a_kj
        with_base = any(taken) if split else any(offset)
        rows = in_rows(x, segments)
        expanded = x.new_empty(rank + with_base, *rows.shape)
        torch.mul(rows, _features_of_rows(A - per_segment(taken, A) if any(taken) else A, segments), out=expanded[:rank])
        if with_base:
            expanded[rank] = rows
        z = (expanded.view(-1, x.shape[1]) @ weight.T).view(*expanded.shape[:-1], weight.shape[0])
        y = x.new_empty(x.shape[0], weight.shape[0])  # not a view of something: a model may add to it in place
        by_rows = y.view(z.shape[1:])
        torch.sum(z[:rank] * _features_of_rows(B.mT, segments), dim=0, dtype=x.dtype, out=by_rows)
        if split:
            if with_base:
                by_rows.add_(z[rank] * to_rows(per_segment(taken, B) * (B.sum(2)[:, None] - 1.0), segments))
                z[:rank] += z[rank] * per_row(taken, segments, x)
            if y.is_cuda:  # where addmm may round x W0^T before it adds, and what is small beside it is lost
                y = torch.mm(x, weight.T, out_dtype=torch.float32).add_(y).to(y.dtype)
            else:
                y.addmm_(x, weight.T)
        elif with_base:
            by_rows.add_(z[rank] * per_row(offset, segments, x))
        ctx.save_for_backward(x, weight, A, B, z[:rank])
        ctx.offset, ctx.segments = offset, segments
        return y

    @staticmethod
    @once_differentiable
    @as_written
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, z = ctx.saved_tensors
        rank, residual, segments = A.shape[1], any(ctx.offset), ctx.segments
        rows, drows = in_rows(x, segments), in_rows(dy.contiguous(), segments)
        dz = dy.new_empty(rank + residual, *drows.shape)
        torch.mul(drows, _features_of_rows(B.mT, segments), out=dz[:rank])
        if residual:
            torch.mul(drows, per_row(ctx.offset, segments, dy), out=dz[rank])
        dexpanded = (dz.view(-1, dy.shape[1]) @ weight).view(*dz.shape[:-1], x.shape[1])
        dx = torch.sum(dexpanded[:rank] * _features_of_rows(A, segments), dim=0, dtype=x.dtype)
        if residual:
            dx += dexpanded[rank]
        dA = from_rows(torch.sum(dexpanded[:rank] * rows, dim=2, dtype=A.dtype).transpose(0, 1), segments, A.dtype)
        dB = from_rows(torch.sum(z * drows, dim=2, dtype=B.dtype).transpose(0, 1), segments, B.dtype).mT
        return dx.view(x.shape), None, dA, dB, None, None, None


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


def _modulated(weight: Tensor, A: Tensor, B: Tensor, offset: float) -> Tensor:
    """W0 * (offset + B A) in this thread's scratch, [out, in]; the product is formed in A's dtype (float32 masters)."""
    out = SCRATCH.matrix("weight", (len(weight), weight.shape[1]), weight)
    if _is_half(weight):
        return _deviation(weight, A, B, offset, out).add_(weight)
    product = torch.mm(B, A, out=out)
    if offset:
        product.add_(offset)
    return product.mul_(weight)


def _deviation(weight: Tensor, A: Tensor, B: Tensor, offset: float, out: Tensor) -> Tensor:
    """W0 * (M - 1) into `out` [out, in] of the weight's half type; M - 1 is formed in A's dtype."""
    deviation = torch.mm(B, A, out=SCRATCH.matrix("product", (len(weight), weight.shape[1]), A))
    if offset != 1.0:
        deviation.add_(offset - 1.0)
    return out.copy_(deviation).mul_(weight)
