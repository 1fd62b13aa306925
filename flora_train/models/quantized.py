"""How is a quantised base layer's weight read, without keeping it? Dequantised when a formulation of fLoRA wants it, and again
in the backward: between the two the layer holds what its quantiser left of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

Saved = Tensor | tuple[torch.Size, tuple[int, ...]]


def is_quantized(layer: nn.Module) -> bool:
    """Whether `layer` holds its weight as a quantiser that PEFT knows packed it: bitsandbytes' 4 and 8 bit, HQQ's layers (W_q),
    or torchao's tensors."""
    weight = type(getattr(layer, "weight", None))
    return hasattr(layer, "W_q") or weight.__name__ in ("Params4bit", "Int8Params") or weight.__module__.startswith("torchao.")


@contextmanager
def dequantized(layer: nn.Module, dtype: torch.dtype, keep: bool = False) -> Iterator[Tensor]:
    """The weight [out, in] in `dtype`, for a forward inside. What autograd saves of it is dropped, and dequantized again in
    the backward; unless `keep`, for a forward that is itself run again, right before its backward."""
    weight = _read(layer, dtype)
    place = weight.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Saved:
        return (tensor.shape, tensor.stride()) if tensor.untyped_storage().data_ptr() == place else tensor

    def unpack(saved: Saved) -> Tensor:
        return saved if isinstance(saved, Tensor) else _read(layer, dtype).as_strided(*saved)

    with nullcontext() if keep else torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield weight


def _read(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Through PEFT, which knows every quantiser's own call (and takes seconds to load)."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach().to(dtype)
