"""What does torch.autocast mean for adapters? Tokens and frozen weights are cast as torch casts those of a linear layer; the
float32 masters are not, and nothing inside an op is cast behind its back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def linear_dtype(x: Tensor) -> torch.dtype:
    """The type in which `F.linear(x, weight)` would multiply."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def as_linear_casts(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type in which `F.linear(x, weight)` would multiply them, differentiable."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight
    return x.to(linear_dtype(x)), weight.to(linear_dtype(x))


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """As if autocast were off for x's device."""
    return torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext()


def autocast_disabled(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A hand-written backward that an autocast around `backward()` does not touch."""

    @wraps(backward)
    def run(ctx: Any, dy: Tensor) -> Any:
        with no_autocast(dy):
            return backward(ctx, dy)

    return run
