"""How large are the tiles of fLoRA's Triton kernels? Chosen by trial on an H100 for tokens in half precision that its copy
engine fetches (benchmarks/results/kernel_times_cuda.md has their times), elsewhere by what registers hold on every chip
(benchmarks/compile_kernels.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from flora_train.kernels.segments import Segments


@dataclass(frozen=True)
class MatmulTiles:
    """A program makes [tokens, features] of y, `summed` numbers of the sum at a time."""

    features: int
    summed: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GradientTiles:
    """A program holds [outs, ins] of W0's gradient, which it sums `tokens` at a time."""

    outs: int
    ins: int
    tokens: int
    warps: int
    stages: int


def matmul_tiles(dtype: torch.dtype, rank: int, described: bool, split: bool) -> MatmulTiles:
    if described:
        return MatmulTiles(128, 32, 8, 4) if split and rank > 16 else MatmulTiles(128, 64, 8, 3)
    return MatmulTiles(64, 32, 8 if rank > (16 if dtype == torch.float32 else 32) else 4, 2)


def block_tokens(segments: Segments, dtype: torch.dtype, rank: int, capability: int, described: bool) -> int:
    """Tokens that share a modulated tile of W0: the more, the less modulation costs, as far as segments are long enough and
    registers hold the sums beside the factors (sm_90 and sm_100 multiply from shared memory and leave more of them).
    capability: of the GPU, 90 for an H100."""
    most, few = (256, rank <= 16) if 90 <= capability < 120 else (128, rank <= 32)
    most = 64 if dtype == torch.float32 else most if few or described else most // 2
    return min(most, max(64, triton.next_power_of_2(segments.tokens // len(segments))))


def gradient_tiles(dtype: torch.dtype, rank: int, each: float, described: bool) -> GradientTiles:
    """each: tokens per adapter."""
    if described:
        return GradientTiles(128, 128, 64, 8, 4 if each >= LONG and rank <= 32 else 3)
    return GradientTiles(32, 32, 16, 4, 2) if dtype == torch.float32 else GradientTiles(64, 64, 32, 8, 2)


LONG = 512


def parts(K: int, outs: int, ins: int) -> tuple[int, int]:
    """(parts of rows, columns at a time) for outs x ins tiles of each of K adapters. A program takes one part of one column. Every
    part of rows is one more dA in memory, every column at a time one more dB: both as few as keep the device busy."""
    columns = min(ins, max(-(-ENOUGH_PROGRAMS // K), -(-ins // MOST_LAUNCHES)))
    return min(outs, max(1, ENOUGH_PROGRAMS // (K * columns))), columns


ENOUGH_PROGRAMS = 256
"""Nearly two for every multiprocessor of an H100."""
MOST_LAUNCHES = 4


def describable(x: Tensor, weight: Tensor, order: Tensor | None) -> bool:
    """Whether a Hopper GPU's copy engine could fetch the tiles: of tokens that lie in order, in rows of whole 16 bytes. (Not
    measured on other chips, and float32 is not worth it.)"""
    return (
        order is None
        and x.dtype != torch.float32
        and compute_capability(x.device) == 90
        and all(n * x.element_size() % 16 == 0 for n in weight.shape)
        and x.shape[0] > 0
    )


def aligned(*tensors: Tensor) -> bool:
    """Whether they begin where the copy engine can."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@lru_cache(maxsize=16)
def compute_capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100; the interpreter passes for the latter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
