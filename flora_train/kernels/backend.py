"""Which kernels compute the adapters: torch's operators, or our own in Triton? One choice for the process, made when a run starts."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from flora_train.config.errors import fail

Backend = Literal["auto", "torch", "triton"]

_chosen: Literal["torch", "triton"] = "torch"


def use_backend(wanted: Backend, device: torch.device) -> None:
    """Compute on `device` by this backend from now on. auto is torch: the Triton kernels are exact (their tests), but nobody
    has timed them on a GPU yet. Raises UserError where Triton was asked for and cannot run."""
    global _chosen
    if wanted == "triton" and (reason := _why_not_triton(device)):
        raise fail("kernels.backend", wanted, f"{reason}; leave it at auto")
    _chosen = "triton" if wanted == "triton" else "torch"


def runs_in_triton(x: Tensor) -> bool:
    """Whether our own kernels take tensors of this type: not before they were chosen, and float64, for references, never."""
    return _chosen == "triton" and x.dtype != torch.float64


def _why_not_triton(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed: pip install triton"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a GPU, and this run is on {device.type} (TRITON_INTERPRET=1 interprets the kernels, for tests)"
    return None
