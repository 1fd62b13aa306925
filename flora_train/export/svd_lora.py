"""How does any adapter become a LoRA, for servers that take nothing else? The truncated SVD of what it adds to each weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import dense_weight
from flora_train.export.low_rank import energies, smallest_rank, truncated


@dataclass(frozen=True)
class SvdLora:
    """spec: a LoRA of scale 1 on the same layers; factors: module -> B [out, r] and A [r, in]; error: |dW - B A| / |dW|, Frobenius over
    all layers; biases: how many layers' biases the adapter changes, which a LoRA leaves as they are."""

    spec: AdapterSpec
    factors: Mapping[str, tuple[Tensor, Tensor]]
    error: float
    biases: int


@torch.no_grad()
def lora_stand_in(
    bank: AdapterBank, name: str, rank: int | None, max_error: float | None, report: Callable[[float], None] = lambda share: None
) -> SvdLora:
    """The closest LoRA of this rank, or of the smallest rank (the same in all layers) within `max_error`. report: called with the share
    of layers done. The bank stays as it is."""
    pool, member = bank.location[bank.id_of(name)]
    layers = 1 if max_error is None else 2
    spectra: dict[str, Tensor] = {}
    if max_error is not None:
        for module, delta in deltas(bank, name):
            spectra[module] = energies(delta)
            report(len(spectra) / len(pool.targets) / layers)
        rank = smallest_rank(list(spectra.values()), max_error)
    assert rank is not None
    factors, lost, total = {}, 0.0, 0.0
    for module, delta in deltas(bank, name):
        B, A = truncated(delta, rank)
        factors[module] = (B.cpu(), A.cpu())
        lost += float((delta - B.double() @ A.double()).square().sum())
        total += float(delta.square().sum())
        report(1 - (1 - len(factors) / len(pool.targets)) / layers)
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
        init_from=None,
    )
    return SvdLora(spec, factors, (lost / total) ** 0.5 if total else 0.0, _changed_biases(bank, name))


def deltas(bank: AdapterBank, name: str) -> Iterator[tuple[str, Tensor]]:
    """Module -> what the adapter adds to its weight, float64 [out, in]. Raises UserError for an unknown name."""
    pool, member = bank.location[bank.id_of(name)]
    for module, params in bank.parameters_of(name).items():
        target, layer = pool.targets[module], bank.model.get_submodule(module)
        weight = dense_weight(layer.base_layer, target).double()  # type: ignore[arg-type]
        merged, _ = pool.method.merge(weight, None, params, pool.specs[member], target.feedforward)
        yield module, merged - weight


def write_into(bank: AdapterBank, svd_lora: SvdLora) -> None:
    """Give the bank's LoRA of that name these numbers."""
    for module, params in bank.parameters_of(svd_lora.spec.name).items():
        B, A = svd_lora.factors[module]
        params["B"].copy_(B)
        params["A"].copy_(A)


def _changed_biases(bank: AdapterBank, name: str) -> int:
    pool, member = bank.location[bank.id_of(name)]
    changed = 0
    for module, params in bank.parameters_of(name).items():
        target, layer = pool.targets[module], bank.model.get_submodule(module)
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        if bias is not None:
            weight = dense_weight(layer.base_layer, target)  # type: ignore[arg-type]
            after = pool.method.merge(weight, bias, params, pool.specs[member], target.feedforward)[1]
            changed += after is not None and not torch.equal(after, bias)
    return changed
