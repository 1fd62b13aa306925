"""Which tokens does a Triton program take? Tables on the device that are made once per batch, for every kernel and layer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flora_train.kernels.segments import Segments

BLOCK_TOKENS = 64
BLOCK_FEATURES = 64


@lru_cache(maxsize=256)
def block_table(segments: Segments, device: torch.device, tokens: int = BLOCK_TOKENS) -> tuple[Tensor, Tensor]:
    """(bounds [K + 1], blocks [T // tokens + K, 3]), int32. A block of up to `tokens` tokens is a segment, its first token and
    the segment's end; the spare ones at the end say segment -1. Made once per batch, not once per layer: making it would wait
    for the device."""
    rows = [(k, first, end) for k, start, end in segments for first in range(start, end, tokens)]
    spare = segments.tokens // tokens + len(segments) - len(rows)
    table = [*rows, *[(-1, 0, 0)] * spare]
    return (
        torch.tensor(segments.bounds, dtype=torch.int32, device=device),
        torch.tensor(table, dtype=torch.int32, device=device),
    )


@lru_cache(maxsize=256)
def rank_table(segments: Segments, rank: int, device: torch.device) -> Tensor:
    """How many of the stacks' `rank` ranks each segment uses, [K] int32. Made once per batch."""
    return torch.tensor(segments.ranks or [rank] * len(segments), dtype=torch.int32, device=device)


def like(tensor: Tensor) -> Tensor:
    """What an op returns for a tensor of this shape and type, for torch.compile: contiguous, as the kernels write it."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@triton.jit
def _by_feature(stack, ranks, laid, features, rank, segment, of_feature, of_rank, FEATURES: tl.constexpr, RANK: tl.constexpr):
    """laid[k, f, j] = stack[k, f, j] for the ranks of adapter k, zeros beyond."""
    k = tl.program_id(0).to(tl.int64)
    f, j = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES), tl.arange(0, RANK)
    used = j < tl.minimum(tl.load(ranks + k), rank)
    there = f[:, None] < features
    tile = tl.load(stack + k * segment + f[:, None] * of_feature + j[None, :] * of_rank, mask=there & used[None, :], other=0.0)
    tl.store(laid + (k * features + f[:, None]) * RANK + j[None, :], tile.to(tl.float32), mask=there)


def by_feature(stack: Tensor, ranks: Tensor, dim: int) -> Tensor:
    """Factors of K adapters, their ranks along `dim`, 1 (A [K, r, in]) or 2 (B [K, out, r]) -> [K, features, RANK] float32: the
    ranks padded with zeros to what Triton multiplies, so that kernels need no mask along them."""
    K, features, rank = len(stack), stack.shape[3 - dim], stack.shape[dim]
    padded = padded_rank(rank)
    laid = stack.new_empty(K, features, padded, dtype=torch.float32)
    with torch.cuda.device_of(stack):
        _by_feature[(K, triton.cdiv(features, BLOCK_FEATURES))](
            stack, ranks, laid, features, rank, stack.stride(0), stack.stride(3 - dim), stack.stride(dim),
            FEATURES=BLOCK_FEATURES, RANK=padded,
        )  # fmt: skip
    return laid


def padded_rank(rank: int) -> int:
    """The least size that Triton multiplies, which holds `rank`."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def place(t, there, order, ORDERED: tl.constexpr):
    """Where tokens t of the grouped order lie in memory: there, or with ORDERED where `order` says."""
    if ORDERED:
        return tl.load(order + t, mask=there, other=0).to(tl.int64)
    return t.to(tl.int64)


@triton.jit
def part_of_segment(bounds, k, part, PARTS: tl.constexpr, TOKENS: tl.constexpr):
    """(first, end): the tokens of one of PARTS equal parts of segment k, in whole blocks of TOKENS; the last may be short."""
    start, end = tl.load(bounds + k), tl.load(bounds + k + 1)
    length = tl.cdiv(tl.cdiv(end - start, PARTS), TOKENS) * TOKENS
    first = start + part * length
    return first, tl.minimum(first + length, end)


def matmul_constants(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """What a matmul over the rank is compiled with for tokens of this type: the rank padded to the least size that Triton
    multiplies; float32 means float32, and beside half precision tf32 is the finer type."""
    return {"RANK": padded_rank(rank), "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}


def parts_for(programs: int) -> int:
    """Into how many parts each of `programs` programs is cut, so that a large device has enough of them: their results are
    summed afterwards, in one order, so that every run adds alike."""
    return next((parts for parts in (8, 4, 2) if programs * parts <= ENOUGH_PROGRAMS), 1)


ENOUGH_PROGRAMS = 512
"""Some four for every multiprocessor of an H100."""
