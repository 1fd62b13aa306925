"""The meaning of torch.autocast for adapters: tokens and frozen weights are cast as a linear layer casts
them.

The float32 masters are not cast, and nothing inside an op is cast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `F.linear(x, weight)` multiplies."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def as_linear_casts(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype in which `F.linear(x, weight)` multiplies them, differentiable."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight
    return x.to(linear_dtype(x)), weight.to(linear_dtype(x))


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast is off for x's device."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocast_disabled(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Decorates a hand-written backward so that an autocast around `backward()` does not affect it."""

    @wraps(backward)
    def run(ctx: Any, dy: Tensor) -> Any:
        with no_autocast(dy):
            return backward(ctx, dy)

    return run
