"""How large are the tiles of fLoRA's Triton kernels? What registers hold on every chip (benchmarks/compile_kernels.py), and what
keeps gradients out of memory (benchmarks/roofline.py)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton

from flora_train.kernels import blocks
from flora_train.kernels.blocks import BLOCK_FEATURES, matmul_constants
from flora_train.kernels.segments import Segments

BLOCK_SUMMED = 32
GRADIENT_WARPS = 8


def tuning(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """What the kernels are compiled with for x of this type. Two stages leave room for a second program on a multiprocessor,
    whose matmuls run while this one modulates."""
    return matmul_constants(dtype, rank) | {"num_warps": 4, "num_stages": 2}


def block_tokens(segments: Segments, dtype: torch.dtype, rank: int, capability: int) -> int:
    """Tokens that share a modulated tile of W0: the more, the less modulation costs, as far as segments are long enough and
    registers hold the sums beside the factors (sm_90 and sm_100 multiply from shared memory and leave more of them).
    capability: of the GPU, 90 for an H100."""
    most, few = (256, rank <= 16) if 90 <= capability < 120 else (128, rank <= 32)
    most = 64 if dtype == torch.float32 else most if few else most // 2
    return min(most, max(64, triton.next_power_of_2(segments.tokens // len(segments))))


@lru_cache(maxsize=16)
def compute_capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100; the interpreter passes for the latter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def block_features(dtype: torch.dtype, rank: int) -> int:
    """Features of the tile of W0 that a program modulates: what its registers hold of it beside the factors."""
    return BLOCK_FEATURES // 2 if dtype == torch.float32 and rank > 16 else BLOCK_FEATURES


def gradient_tile(dtype: torch.dtype) -> int:
    """Rows and columns of the tile of P that a program holds beside what it adds up."""
    return 32 if dtype == torch.float32 else 64


def gradient_tiles(K: int, outs: int, ins: int) -> tuple[int, int]:
    """Of the outs x ins tiles of P of each of K adapters, how many a program takes in both directions. The more it takes, the
    fewer parts of dA and dB go through memory; but the device wants programs enough, and a program's part should stay in a
    cache."""
    in_tiles = min(8, ins)
    return max(1, min(outs, K * outs * ins // (in_tiles * blocks.ENOUGH_PROGRAMS))), in_tiles
