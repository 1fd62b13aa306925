"""What merging a route of a switch adapter costs and saves, measured on layers of the model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.merged import adapted_layer
from flora_train.adapters.routed.one_row import OneRow, Route
from flora_train.adapters.routed.route_merge import Layers, RouteMerger
from flora_train.evaluation.generation.merge_costs import timed

REPEATS = 5
"""Timed calls of each layer measured, after one that is not timed; the fastest counts."""


@dataclass(frozen=True)
class RouteCosts:
    """Costs of all layers of an adapter together."""

    merge_seconds: float
    """Time to merge a route."""
    saved_seconds: float
    """Time that the merged layers save for a token; negative if the experts are faster as they are."""


@torch.no_grad()
def measure_route(bank: AdapterBank, row: OneRow, merger: RouteMerger) -> tuple[RouteCosts, Layers]:
    """The costs of a route of the first experts, and the layers that were merged for it.

    Runs one layer of each shape on its own, and merges it; where all layers are merged in one launch, all of
    them.
    """
    weights = torch.full((row.experts.top_k,), 1.0 / row.experts.top_k, device=bank.device)
    route = Route(tuple(range(row.experts.top_k)), weights)
    layers: Layers = {}
    merge_seconds = 0.0
    if merger.is_fused:
        merge_seconds, layers = _fastest_merge(merger, route, None)
    saved_seconds = 0.0
    for modules in _by_shape(row, merger.modules):
        merged = layers
        if not merger.is_fused:
            seconds, merged = _fastest_merge(merger, route, modules[0])
            merge_seconds += len(modules) * seconds
        saved_seconds += len(modules) * _saved(bank, row, modules[0], route=route, merged=merged)
    return RouteCosts(merge_seconds, saved_seconds), layers


def _fastest_merge(merger: RouteMerger, route: Route, module: str | None) -> tuple[float, Layers]:
    device = merger.bank.device
    modules = None if module is None else [module]
    _, layers = timed(lambda: merger.merge(route, modules=modules), device)
    seconds = [timed(lambda: merger.merge(route, layers, modules), device)[0] for _ in range(REPEATS)]
    return min(seconds), layers


def _saved(bank: AdapterBank, row: OneRow, module: str, *, route: Route, merged: Layers) -> float:
    """Seconds that a merged layer saves for a token."""
    layer, (weight, bias) = adapted_layer(bank, module), merged[module]
    x: Tensor = torch.ones(1, 1, layer.in_features, dtype=weight.dtype, device=bank.device)
    adapted, plain = [], []
    with row.using(route):
        for repeat in range(REPEATS + 1):
            adapted_seconds, _ = timed(lambda: row.adapted(layer, module, x), bank.device)
            plain_seconds, _ = timed(lambda: F.linear(x, weight, bias), bank.device)
            if repeat:
                adapted.append(adapted_seconds)
                plain.append(plain_seconds)
    return min(adapted) - min(plain)


def _by_shape(row: OneRow, modules: tuple[str, ...]) -> list[list[str]]:
    """The layers, grouped by what their costs depend on."""
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for module in modules:
        target = row.pool.targets[module]
        groups[target.in_features, target.out_features, target.transposed, target.feedforward].append(module)
    return list(groups.values())
