"""Weights of linear layers with one adapter merged into them, beside the frozen weights, which never change.

They are part of a batch's routing: only a forward of rows of that adapter alone can use them, and the next
routing uses the frozen weights again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.layer import AdapterLinear
from flora_train.adapters.routing import MergedLayer
from flora_train.adapters.targets import dense_weight

EXACT_DTYPES = (torch.float32, torch.float64)
"""In 16 bits a merged weight loses small changes, and texts would differ from those of the adapter."""


@dataclass
class MergedWeights:
    """The merged layers of one adapter."""

    adapter: int
    layers: dict[str, MergedLayer] = field(default_factory=dict)
    """Module name -> merged weight and bias. All other layers run the adapter as usual."""


def mergeable_modules(bank: AdapterBank, adapter: int) -> list[str]:
    """The targets of an adapter whose weight is dense, whole and in float32: neither quantized, sharded or
    offloaded, nor fused experts, nor of a class whose forward is unknown. None of a method that is not one
    weight for all tokens."""
    pool, _ = bank.location[adapter]
    return dense_modules(bank, adapter) if pool.method.merges else []


def dense_modules(bank: AdapterBank, adapter: int, dtypes: Sequence[torch.dtype] = EXACT_DTYPES) -> list[str]:
    """The targets of an adapter whose weight is dense, whole and of one of these types."""
    pool, _ = bank.location[adapter]
    if _is_sharded(bank.model) or torch.is_autocast_enabled(bank.device.type):
        return []
    layers = [name for name, target in pool.targets.items() if not target.experts]
    return [module for module in layers if _is_dense(adapted_layer(bank, module), bank.device, dtypes)]


def adapted_layer(bank: AdapterBank, module: str) -> AdapterLinear:
    """The wrapper of a target layer."""
    layer = bank.model.get_submodule(module)
    assert isinstance(layer, AdapterLinear)
    return layer


@torch.no_grad()
def merge_layer(bank: AdapterBank, adapter: int, module: str) -> MergedLayer:
    """New weight and bias of one layer with this adapter, which must be on the device."""
    pool, member = bank.location[adapter]
    layer, target = adapted_layer(bank, module), pool.targets[module]
    slots = torch.tensor([pool.slot_of[member]], device=bank.device)
    params = {name: values[0] for name, values in pool.gather(module, slots).items()}
    spec = pool.specs[member].at(module)
    weight, bias = pool.method.merge(
        dense_weight(layer.base_layer, target), layer.bias, params, spec=spec, feedforward=target.feedforward
    )
    return MergedLayer(weight, bias)


def merged_bytes(bank: AdapterBank, module: str) -> int:
    """Memory of a layer's merged weight and bias."""
    layer = adapted_layer(bank, module)
    tensors = [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def routed_merged(bank: AdapterBank, adapters: Sequence[int], merged: MergedWeights) -> Iterator[None]:
    """`bank.routed` for rows of one adapter, with its merged weights.

    Raises ValueError if a row belongs to another adapter.
    """
    if set(adapters) != {merged.adapter}:
        raise ValueError(f"rows of adapters {sorted(set(adapters))} with merged weights of {merged.adapter}")
    with bank.routed(adapters):
        routing = bank.router.routing
        assert routing is not None
        routing.merged = merged.layers
        yield


def _is_dense(layer: AdapterLinear, device: torch.device, dtypes: Sequence[torch.dtype]) -> bool:
    base = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D) or "forward" in vars(base):
        return False
    # A hook would not see the calls of a merged layer.
    if base._forward_hooks or base._forward_pre_hooks:
        return False
    weight = base.weight
    if not isinstance(weight, Tensor):
        return False
    is_plain = type(weight) in (Tensor, nn.Parameter) and type(weight.data) is Tensor
    return is_plain and weight.dtype in dtypes and weight.device == device


def _is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
