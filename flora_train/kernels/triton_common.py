"""Tables and helpers that the Triton kernels share. Tables are on the device and built once per batch, for
all kernels and layers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flora_train.kernels.segments import Segments

TILE_TOKENS = 64
TILE_FEATURES = 64
MIN_PROGRAMS = 512
"""About four for every multiprocessor of an H100."""


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for training steps, too
def tile_table(segments: Segments, device: torch.device, tokens: int = TILE_TOKENS) -> tuple[Tensor, Tensor]:
    """(bounds [K + 1], table [T // tokens + K, 3]), int32.

    A row of the table is one tile of up to `tokens` tokens: its segment, its first token and the end of the
    segment. Unused rows at the end have segment -1, so that the table's size depends only on T and K. Built
    once per batch, because building it waits for the device.
    """
    rows: list[tuple[int, int, int]] = []
    for k, start, end in segments:
        rows += [(k, first, end) for first in range(start, end, tokens)]
    unused = segments.tokens // tokens + len(segments) - len(rows)
    rows += [(-1, 0, 0)] * unused
    bounds = torch.tensor(segments.bounds, dtype=torch.int32, device=device)
    return bounds, torch.tensor(rows, dtype=torch.int32, device=device)


def empty_contiguous(tensor: Tensor) -> Tensor:
    """An op's result of this shape and dtype for torch.compile: contiguous, as the kernels write it."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@triton.jit
def _pad_ranks(
    stack, padded, features, rank, segment, of_feature, of_rank, FEATURES: tl.constexpr, RANK: tl.constexpr
):
    """padded[k, f, j] = stack[k, f, j] for j < rank, else 0."""
    k = tl.program_id(0).to(tl.int64)
    f, j = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES), tl.arange(0, RANK)
    mask = f[:, None] < features
    index = k * segment + f[:, None] * of_feature + j[None, :] * of_rank
    tile = tl.load(stack + index, mask=mask & (j[None, :] < rank), other=0.0)
    tl.store(padded + (k * features + f[:, None]) * RANK + j[None, :], tile.to(tl.float32), mask=mask)


def pad_ranks(stack: Tensor, dim: int) -> Tensor:
    """Factors of K adapters -> [K, features, RANK] float32.

    dim: the dimension of the ranks, 1 (A [K, r, in]) or 2 (B [K, out, r]). Ranks are padded with zeros to a
    size that Triton multiplies, so that kernels need no mask along them.
    """
    K, features, rank = len(stack), stack.shape[3 - dim], stack.shape[dim]
    size = padded_rank(rank)
    padded = stack.new_empty(K, features, size, dtype=torch.float32)
    with torch.cuda.device_of(stack):
        _pad_ranks[(K, triton.cdiv(features, TILE_FEATURES))](
            stack, padded, features, rank, stack.stride(0), stack.stride(3 - dim), stack.stride(dim),
            FEATURES=TILE_FEATURES, RANK=size,
        )  # fmt: skip
    return padded


def padded_rank(rank: int) -> int:
    """The smallest size of at least `rank` that Triton multiplies."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def token_index(t, mask, order, ORDERED: tl.constexpr):
    """The position in memory of tokens t of the grouped order: t itself, or with ORDERED the entries of
    `order`."""
    if ORDERED:
        return tl.load(order + t, mask=mask, other=0).to(tl.int64)
    return t.to(tl.int64)


def any_order(order: Tensor | None, placeholder: Tensor) -> Tensor:
    """`order`, or another tensor in its place: a kernel argument must be a tensor, which is not read without
    ORDERED."""
    return placeholder if order is None else order


@triton.jit
def part_of_segment(bounds, k, part, PARTS: tl.constexpr, TOKENS: tl.constexpr):
    """(first, end): the tokens of one of PARTS equal parts of segment k, in whole tiles of TOKENS; the last
    may be shorter."""
    start, end = tl.load(bounds + k), tl.load(bounds + k + 1)
    length = tl.cdiv(tl.cdiv(end - start, PARTS), TOKENS) * TOKENS
    first = start + part * length
    return first, tl.minimum(first + length, end)


def matmul_constants(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """Compile-time constants of a matmul over the rank, for tokens of this dtype.

    float32 is multiplied exactly; beside half precision, tf32 is the more precise type.
    """
    return {"RANK": padded_rank(rank), "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}


def parts_for(programs: int) -> int:
    """The number of parts of each of `programs` programs, so that a large device is busy.

    The results of the parts are summed in a fixed order, so that every run computes the same.
    """
    return next((parts for parts in (8, 4, 2) if programs * parts <= MIN_PROGRAMS), 1)
