"""The backend and the precision of the adapter kernels: one choice per process, made when a run starts."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from flora_train.config.errors import user_error

Backend = Literal["auto", "torch", "triton"]
Precision = Literal["auto", "split", "fused"]

MAX_TRITON_RANK = 64
"""The largest rank that the Triton kernels were compiled for (benchmarks/compile_kernels.py); torch computes
larger ranks."""

_backend: Literal["torch", "triton"] = "torch"
_split = True


def use_backend(backend: Backend, device: torch.device) -> None:
    """Select the backend for this process.

    auto: Triton where it was measured to be faster, on Hopper GPUs
    (benchmarks/results/calibration_cuda_triton.md), else torch. Raises UserError if backend is triton and
    Triton cannot run on `device`.
    """
    global _backend
    reason = why_not_triton(device)
    if backend == "triton" and reason:
        raise user_error("kernels.backend", backend, f"{reason}; leave it at auto")
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    use_triton = backend == "triton" or (backend == "auto" and is_hopper and not reason)
    _backend = "triton" if use_triton else "torch"


def use_precision(precision: Precision) -> None:
    """Select how fLoRA is computed in half precision in this process.

    split: x W0^T + x (W0 * (M - 1))^T where M is near 1, which preserves modulations that half precision
    cannot represent beside 1. fused: x (W0 * M)^T, which saves a matmul and loses them. auto: split
    (benchmarks/results/precision_cpu.md has its cost and its effect).
    """
    global _split
    _split = precision != "fused"


def is_triton() -> bool:
    """Whether the Triton kernels are selected in this process."""
    return _backend == "triton"


def runs_in_triton(x: Tensor, rank: int = 1) -> bool:
    """Whether the Triton kernels compute tokens of this dtype. float64, for references, runs in torch."""
    return is_triton() and x.dtype != torch.float64 and rank <= MAX_TRITON_RANK


def splits(dtype: torch.dtype) -> bool:
    """Whether fLoRA on tokens of this dtype computes M - 1 separately from 1."""
    return _split and dtype in (torch.bfloat16, torch.float16)


def why_not_triton(device: torch.device) -> str | None:
    """The reason why the Triton kernels cannot run on this device; None if they can."""
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed: pip install triton"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        interpreter = "TRITON_INTERPRET=1 interprets the kernels, for tests"
        return f"needs a GPU, and this run is on {device.type} ({interpreter})"
    return None
