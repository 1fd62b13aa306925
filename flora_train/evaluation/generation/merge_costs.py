"""What merging an adapter costs and saves, measured on layers of the model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.merged import adapted_layer, merge_layer, mergeable_modules, merged_bytes
from flora_train.adapters.routing import MergedLayer

T = TypeVar("T")
REPEATS = 2
"""Timed calls of each layer measured, after one that is not timed; the fastest counts."""


@dataclass(frozen=True)
class LayerCosts:
    """Costs of layers of one shape."""

    modules: tuple[str, ...]
    merge_seconds: float
    """Time to merge the adapter into one of the layers."""
    saved_seconds: float
    """Time that one merged layer saves in a step; negative if the adapter is faster as it is."""
    bytes: int
    """Memory of one layer's merged weight and bias."""


@torch.no_grad()
def measure_layers(bank: AdapterBank, adapter: int, rows: int) -> list[LayerCosts]:
    """The costs of an adapter's mergeable layers in a step of one token in each of `rows` rows.

    Runs one layer of each shape on its own. Neither the model's state nor a generator of random numbers
    changes.
    """
    with bank.routed([adapter] * rows):
        return [_measure(bank, adapter, modules, rows=rows) for modules in _by_shape(bank, adapter)]


def _by_shape(bank: AdapterBank, adapter: int) -> Iterator[list[str]]:
    """The adapter's mergeable layers, grouped by what their costs depend on."""
    pool, member = bank.location[adapter]
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for module in mergeable_modules(bank, adapter):
        target, rank = pool.targets[module], pool.specs[member].at(module).rank
        shape = target.in_features, target.out_features, target.transposed, target.feedforward
        groups[*shape, rank, adapted_layer(bank, module).bias is None].append(module)
    yield from groups.values()


def _measure(bank: AdapterBank, adapter: int, modules: list[str], *, rows: int) -> LayerCosts:
    layer = adapted_layer(bank, modules[0])
    weight: Tensor = layer.weight
    x = torch.ones(rows, 1, layer.in_features, dtype=weight.dtype, device=bank.device)
    merging, adapted, plain = [], [], []
    for repeat in range(REPEATS + 1):
        merge_seconds, merged = timed(lambda: merge_layer(bank, adapter, modules[0]), bank.device)
        adapted_seconds, _ = timed(lambda: layer(x), bank.device)
        plain_seconds, _ = timed(_plain(x, merged), bank.device)
        if repeat:
            merging.append(merge_seconds)
            adapted.append(adapted_seconds)
            plain.append(plain_seconds)
    size = merged_bytes(bank, modules[0])
    return LayerCosts(tuple(modules), min(merging), min(adapted) - min(plain), size)


def _plain(x: Tensor, merged: MergedLayer) -> Callable[[], Tensor]:
    return lambda: F.linear(x, merged.weight, merged.bias)


def timed(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds until the result is computed, and the result."""
    _synchronize(device)
    started = time.perf_counter()
    result = run()
    _synchronize(device)
    return time.perf_counter() - started, result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
