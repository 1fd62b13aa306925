"""Approximates any adapter by a LoRA, for servers that support only LoRA: the truncated SVD of its change of
each weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import dense_weight
from flora_train.export.low_rank import energies, relative_norm, smallest_rank, truncated


@dataclass(frozen=True)
class SvdLora:
    """The closest LoRA to an adapter."""

    spec: AdapterSpec
    """A LoRA of scale 1 on the same layers."""
    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Module -> B [out, r] and A [r, in], float32 on the CPU."""
    error: float
    """|dW - B A| / |dW|, Frobenius over all layers."""
    biases: int
    """Number of layers whose bias the adapter changes; a LoRA does not change biases."""


def _no_report(share: float) -> None:
    pass


@torch.no_grad()
def compute_svd_lora(
    bank: AdapterBank,
    name: str,
    *,
    rank: int | None,
    max_error: float | None,
    report: Callable[[float], None] = _no_report,
) -> SvdLora:
    """The closest LoRA of this rank, or of the smallest rank (the same in all layers) whose error is at most
    `max_error`.

    report: called with the share of layers that is done. The bank is unchanged.
    """
    pool, member = bank.location[bank.id_of(name)]
    passes = 1
    if max_error is not None:
        passes = 2
        spectra: dict[str, Tensor] = {}
        for module, delta in deltas(bank, name):
            spectra[module] = energies(delta)
            report(len(spectra) / len(pool.targets) / passes)
        rank = smallest_rank(list(spectra.values()), max_error)
    assert rank is not None
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    squared_error = squared_norm = 0.0
    for module, delta in deltas(bank, name):
        B, A = truncated(delta, rank)
        factors[module] = (B.cpu(), A.cpu())
        squared_error += float((delta - B.double() @ A.double()).square().sum())
        squared_norm += float(delta.square().sum())
        remaining = 1 - len(factors) / len(pool.targets)
        report(1 - remaining / passes)
    spec = replace(
        pool.specs[member],
        method="lora",
        rank=rank,
        alpha=float(rank),
        scaling=1.0,
        rslora=False,
        dropout=0.0,
        target_modules=tuple(pool.targets),
        feedforward_modules=None,
        parent_module=None,
        rank_pattern=(),
        alpha_pattern=(),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_from=None,
    )
    error = relative_norm(squared_error, squared_norm)
    return SvdLora(spec, factors, error=error, biases=_changed_biases(bank, name))


def deltas(bank: AdapterBank, name: str) -> Iterator[tuple[str, Tensor]]:
    """Module -> the adapter's change of its weight, float64 [out, in]. Raises UserError for an unknown
    name."""
    pool, member = bank.location[bank.id_of(name)]
    for module, params in bank.parameters_of(name).items():
        target, layer = pool.targets[module], _layer(bank, module)
        weight = dense_weight(layer.base_layer, target).double()
        spec = pool.specs[member].at(module)
        merged, _ = pool.method.merge(weight, None, params, spec=spec, feedforward=target.feedforward)
        yield module, merged - weight


def write_into(bank: AdapterBank, svd_lora: SvdLora) -> None:
    """Copy the factors into the bank's LoRA of the same name."""
    for module, params in bank.parameters_of(svd_lora.spec.name).items():
        B, A = svd_lora.factors[module]
        params["B"].copy_(B)
        params["A"].copy_(A)


def _changed_biases(bank: AdapterBank, name: str) -> int:
    pool, member = bank.location[bank.id_of(name)]
    changed = 0
    for module, params in bank.parameters_of(name).items():
        target, layer = pool.targets[module], _layer(bank, module)
        bias: Tensor | None = layer.bias
        if bias is not None:
            weight = dense_weight(layer.base_layer, target)
            spec = pool.specs[member].at(module)
            _, merged_bias = pool.method.merge(
                weight, bias, params, spec=spec, feedforward=target.feedforward
            )
            changed += merged_bias is not None and not torch.equal(merged_bias, bias)
    return changed


def _layer(bank: AdapterBank, module: str) -> Any:
    return bank.model.get_submodule(module)
