"""Which kernels compute the adapters, and how exactly? One choice for the process, made when a run starts."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from flora_train.config.errors import user_error

Backend = Literal["auto", "torch", "triton"]
Precision = Literal["auto", "split", "fused"]

_chosen: Literal["torch", "triton"] = "torch"
_split = True


def use_backend(wanted: Backend, device: torch.device) -> None:
    """Compute on `device` by this backend from now on. auto is our own kernels where they were timed and are faster, on Hopper
    GPUs (benchmarks/results/calibration_cuda_triton.md), and torch elsewhere. Raises UserError where Triton was asked for and
    cannot run."""
    global _chosen
    reason = why_not_triton(device)
    if wanted == "triton" and reason:
        raise user_error("kernels.backend", wanted, f"{reason}; leave it at auto")
    timed = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    _chosen = "triton" if wanted == "triton" or (wanted == "auto" and timed and not reason) else "torch"


def use_precision(wanted: Precision) -> None:
    """How fLoRA is computed in half precision from now on. split: x W0^T + x (W0 * (M - 1))^T where M is near 1, which keeps modulations
    that half precision cannot hold beside 1. fused: x (W0 * M)^T, one matmul less and deaf to them. auto is split: what it costs
    and what it keeps is in benchmarks/results/precision_cpu.md."""
    global _split
    _split = wanted != "fused"


TRITON_RANKS = 64
"""The largest rank that our kernels were compiled for (benchmarks/compile_kernels.py); torch takes what is larger."""


def runs_in_triton(x: Tensor, rank: int = 1) -> bool:
    """Whether our own kernels take tensors of this type: not before they were chosen, and float64, for references, never."""
    return _chosen == "triton" and x.dtype != torch.float64 and rank <= TRITON_RANKS


def splits(dtype: torch.dtype) -> bool:
    """Whether fLoRA on tokens of this type keeps M - 1 apart from 1."""
    return _split and dtype in (torch.bfloat16, torch.float16)


def why_not_triton(device: torch.device) -> str | None:
    """Why our own kernels cannot run on this device; None if they can."""
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed: pip install triton"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a GPU, and this run is on {device.type} (TRITON_INTERPRET=1 interprets the kernels, for tests)"
    return None
