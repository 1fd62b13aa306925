"""Reads the weight of a quantized base layer without storing it.

It is dequantized when a formulation of fLoRA needs it, and again in the backward; in between only the
quantized weight is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

Saved = Tensor | tuple[torch.Size, tuple[int, ...]]
"""A tensor that autograd saves, or the shape and strides of a view of the weight."""


def is_quantized(layer: nn.Module) -> bool:
    """Whether `layer` stores its weight as a quantizer that PEFT supports does: bitsandbytes, HQQ (W_q), or
    torchao."""
    weight = type(getattr(layer, "weight", None))
    is_bitsandbytes = weight.__name__ in ("Params4bit", "Int8Params")
    return hasattr(layer, "W_q") or is_bitsandbytes or weight.__module__.startswith("torchao.")


@contextmanager
def dequantized(layer: nn.Module, dtype: torch.dtype, keep: bool = False) -> Iterator[Tensor]:
    """The weight [out, in] in `dtype`, for a forward inside the context.

    What autograd saves of it is dropped and dequantized again in the backward. keep: it is not dropped, for a
    forward that is itself recomputed right before its backward.
    """
    weight = _read(layer, dtype)
    address = weight.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Saved:
        if tensor.untyped_storage().data_ptr() != address:
            return tensor
        return tensor.shape, tensor.stride()

    def unpack(saved: Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        shape, strides = saved
        return _read(layer, dtype).as_strided(shape, strides)

    hooks = nullcontext() if keep else torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    with hooks:
        yield weight


def _read(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Through PEFT, which has the call of every quantizer."""
    # Imported here, because it takes seconds to load.
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach().to(dtype)
