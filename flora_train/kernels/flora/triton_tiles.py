"""Tile sizes of fLoRA's Triton kernels.

For half precision with the Tensor Memory Accelerator (TMA), they were chosen by measurement on an H100
(benchmarks/results/kernel_times_cuda.md), otherwise by the registers of every supported chip
(benchmarks/compile_kernels.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from flora_train.kernels.segments import Segments

LONG = 512
"""Tokens per adapter from which the gradient kernel uses one more pipeline stage."""
MIN_PROGRAMS = 256
"""Nearly two for every multiprocessor of an H100."""
MAX_LAUNCHES = 4


@dataclass(frozen=True)
class MatmulTiles:
    """A program computes [tokens, features] of y, in steps of `summed` terms of the sum."""

    features: int
    summed: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GradientTiles:
    """A program holds [outs, ins] of W0's gradient and sums over `tokens` at a time."""

    outs: int
    ins: int
    tokens: int
    warps: int
    stages: int


def matmul_tiles(dtype: torch.dtype, rank: int, *, uses_tma: bool, split: bool) -> MatmulTiles:
    """Tiles of the forward and of dX."""
    if uses_tma:
        return MatmulTiles(128, 32, 8, 4) if split and rank > 16 else MatmulTiles(128, 64, 8, 3)
    max_rank_of_four_warps = 16 if dtype == torch.float32 else 32
    return MatmulTiles(64, 32, 8 if rank > max_rank_of_four_warps else 4, 2)


def tile_tokens(segments: Segments, dtype: torch.dtype, rank: int, *, capability: int, uses_tma: bool) -> int:
    """Tokens that share a modulated tile of W0.

    More tokens make the modulation cheaper, as far as segments are long enough and registers hold the sums
    beside the factors (sm_90 and sm_100 multiply from shared memory and leave more of them). capability: of
    the GPU, 90 for an H100.
    """
    most, is_small_rank = (256, rank <= 16) if 90 <= capability < 120 else (128, rank <= 32)
    if dtype == torch.float32:
        most = 64
    elif not (is_small_rank or uses_tma):
        most //= 2
    return min(most, max(64, triton.next_power_of_2(segments.tokens // len(segments))))


def gradient_tiles(
    dtype: torch.dtype, rank: int, *, tokens_per_adapter: float, uses_tma: bool
) -> GradientTiles:
    """Tiles of dA and dB."""
    if uses_tma:
        return GradientTiles(128, 128, 64, 8, 4 if tokens_per_adapter >= LONG and rank <= 32 else 3)
    return GradientTiles(32, 32, 16, 4, 2) if dtype == torch.float32 else GradientTiles(64, 64, 32, 8, 2)


def gradient_grid(K: int, outs: int, ins: int) -> tuple[int, int]:
    """(parts of rows, columns at a time) for outs x ins tiles of each of K adapters.

    A program computes one part of one column. Every part of rows needs another dA in memory, every column at
    a time another dB: both are as few as keep the device busy.
    """
    columns = min(ins, max(-(-MIN_PROGRAMS // K), -(-ins // MAX_LAUNCHES)))
    return min(outs, max(1, MIN_PROGRAMS // (K * columns))), columns


def can_use_tma(x: Tensor, weight: Tensor, order: Tensor | None) -> bool:
    """Whether a Hopper GPU's TMA can load the tiles: of grouped tokens, in rows of whole 16 bytes.

    Not measured on other chips, and not faster for float32.
    """
    return (
        order is None
        and x.dtype != torch.float32
        and compute_capability(x.device) == 90
        and all(n * x.element_size() % 16 == 0 for n in weight.shape)
        and x.shape[0] > 0
    )


def tma_aligned(*tensors: Tensor) -> bool:
    """Whether the tensors begin at addresses that TMA can load from."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@lru_cache(maxsize=16)
def compute_capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100, and 90 for the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
