"""Weights into which the experts of a route are merged, beside the frozen weights, which never change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.merged import EXACT_DTYPES, adapted_layer, merged_bytes
from flora_train.adapters.methods.routed import expert_method
from flora_train.adapters.routed.one_row import OneRow, Route
from flora_train.adapters.routed.switch import joined_experts
from flora_train.adapters.routing import MergedLayer
from flora_train.adapters.targets import dense_weight
from flora_train.kernels.backend import runs_in_triton

Layers = dict[str, MergedLayer]


class RouteMerger:
    """Merges routes of one switch adapter into these of its layers."""

    def __init__(self, bank: AdapterBank, row: OneRow, modules: Sequence[str]) -> None:
        self.bank, self.row, self.modules = bank, row, tuple(modules)
        self.bytes = sum(merged_bytes(bank, module) for module in modules)
        """Memory of one merged route."""
        dtypes = {adapted_layer(bank, module).weight.dtype for module in modules}
        some = adapted_layer(bank, modules[0]).weight if modules else row.pool.values
        has_factors = row.experts.method in ("lora", "flora") and row.pool.values.dtype == torch.float32
        self.is_fused = len(dtypes) == 1 and has_factors and runs_in_triton(some, row.spec.rank)
        """Whether all layers are merged in one launch."""
        self._fused: dict[int, object] = {}

    @torch.no_grad()
    def merge(self, route: Route, into: Layers | None = None, modules: Sequence[str] | None = None) -> Layers:
        """The layers (or these of them) with a route merged. into: layers of another route, whose memory is
        used again."""
        layers = self._allocated() if into is None and self.is_fused else into
        if self.is_fused and layers is not None:
            self._merge_fused(route, layers)
            return layers
        weights = [1.0] if route.is_shared else route.weights.tolist()
        return {
            module: self._merge_one(module, route.experts, weights, into)
            for module in modules or self.modules
        }

    def _allocated(self) -> Layers:
        layers: Layers = {}
        for module in self.modules:
            layer = adapted_layer(self.bank, module)
            weight = dense_weight(layer.base_layer, layer.target)
            empty = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            layers[module] = MergedLayer(empty, layer.bias)
        return layers

    def _merge_fused(self, route: Route, layers: Layers) -> None:
        # Imported here, because triton is optional and slow to load.
        from flora_train.kernels.merge_triton import FusedMerge, MergedMatrix

        row = self.row
        key = id(next(iter(layers.values())).weight)
        fused = self._fused.get(key)
        if not isinstance(fused, FusedMerge):
            matrices = []
            for module in self.modules:
                layer, layout = adapted_layer(self.bank, module), row.pool.layout[module]
                weight = dense_weight(layer.base_layer, layer.target)
                merged = layers[module].weight
                matrices.append(MergedMatrix(weight, merged, layout["A"][0], layout["B"][0]))
            fused = FusedMerge(matrices, row.spec.rank, multiply=row.experts.method == "flora")
            self._fused[key] = fused
        values = row.pool.state(row.member)["values"]
        experts = torch.tensor(route.experts, device=values.device)
        weights = torch.ones_like(route.weights) if route.is_shared else route.weights
        factors = weights.float()
        if row.experts.method == "lora":
            factors = factors * row.spec.scaling
        fused(values, experts, factors)

    def _merge_one(
        self,
        module: str,
        experts: Sequence[int],
        weights: Sequence[float],
        into: Mapping[str, MergedLayer] | None,
    ) -> MergedLayer:
        row, layer = self.row, adapted_layer(self.bank, module)
        target, params = row.pool.targets[module], row.params[module]
        weight = dense_weight(layer.base_layer, target)
        if row.experts.method == "lora" and weight.dtype in EXACT_DTYPES:
            memory = None if into is None else into[module].weight
            merged = _merge_lora(weight, params, experts, weights, scaling=row.spec.scaling, memory=memory)
            return MergedLayer(merged, layer.bias)
        joined = joined_experts(params, experts, weights, row.spec)
        return MergedLayer(
            *expert_method(row.spec).merge(
                weight, layer.bias, joined, spec=row.spec, feedforward=target.feedforward
            )
        )


def _merge_lora(
    weight: Tensor,
    params: Mapping[str, Tensor],
    experts: Sequence[int],
    weights: Sequence[float],
    *,
    scaling: float,
    memory: Tensor | None,
) -> Tensor:
    """W0 + sum_e w_e scaling B_e A_e, without another matrix of W0's size."""
    if memory is None:
        memory = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    summed = weight
    for expert, share in zip(experts, weights, strict=True):
        B, A = params["B"][expert].to(weight.dtype), params["A"][expert].to(weight.dtype)
        summed = torch.addmm(summed, B, A, alpha=share * scaling, out=memory)
    return memory
