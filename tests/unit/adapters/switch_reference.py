"""A model of adapted layers with switch adapters, written from the paper's formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec


class TwoBlocks(nn.Module):
    """Embeddings, two feed-forward blocks and an output layer."""

    def __init__(self, width: int = 8, inner: int = 12, vocabulary: int = 20) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, width)
        self.first = nn.Linear(width, inner)
        self.second = nn.Linear(inner, width, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        return self.second(torch.tanh(self.first(x)))


def tiny_bank(specs: Sequence[AdapterSpec], dtype: torch.dtype = torch.float64) -> AdapterBank:
    torch.manual_seed(3)
    bank = AdapterBank.attach(TwoBlocks().to(dtype), specs, dtype=dtype)
    for adapter in range(len(specs)):
        row = bank.row(adapter)
        row += 0.5 * torch.randn(row.shape, generator=torch.Generator().manual_seed(adapter), dtype=dtype)
    return bank


@dataclass
class Reference:
    """One switch adapter in float64, with leaves of its own."""

    bank: AdapterBank
    adapter: int

    def __post_init__(self) -> None:
        pool, member = self.bank.location[self.adapter]
        self.spec = pool.specs[member]
        assert self.spec.experts is not None
        self.experts = self.spec.experts
        self.leaves = {
            module: {name: value.detach().clone().requires_grad_() for name, value in params.items()}
            for module, params in pool.row(member).items()
        }

    def weights_of(self, token: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Expert -> its weight, and all probabilities [E], for the input of the first layer [in]."""
        logits = self.leaves["first"]["router"] @ token.detach()
        probabilities = logits.exp() / logits.exp().sum()
        ranked = sorted(range(self.experts.count), key=lambda e: (-float(probabilities[e].detach()), e))
        chosen = ranked[: self.experts.top_k]
        if self.experts.top_k == 1:
            value = probabilities[chosen[0]]
            return {chosen[0]: 1.0 + value - value.detach()}, probabilities
        total = sum(probabilities[e] for e in chosen)
        return {e: probabilities[e] / total for e in chosen}, probabilities

    def layer(self, name: str, x: Tensor, weights: dict[int, Tensor]) -> Tensor:
        base: Any = self.bank.model.get_submodule(name).base_layer  # type: ignore[union-attr]
        y = base(x)
        params = self.leaves[name]
        total = y
        for expert, weight in weights.items():
            total = total + weight * self.delta(params, expert, base.weight, x=x, y=y)
        return total

    def delta(self, params: dict[str, Tensor], expert: int, W0: Tensor, *, x: Tensor, y: Tensor) -> Tensor:
        if self.experts.method == "ia3":
            return (params["l"][expert] - 1.0) * y
        product = params["B"][expert] @ params["A"][expert]
        if self.experts.method == "lora":
            return self.spec.scaling * (product @ x)
        return (W0 * product) @ x

    def row(self, ids: Tensor) -> tuple[Tensor, list[dict[int, Tensor]], Tensor]:
        """Outputs [T, d], the weights of each token, and the probabilities [T, E]."""
        outputs, chosen, probabilities = [], [], []
        for token in ids:
            x = self.bank.model.embeddings.weight[token]  # type: ignore[union-attr, index]
            weights, of_token = self.weights_of(x)
            hidden = torch.tanh(self.layer("first", x, weights))
            outputs.append(self.layer("second", hidden, weights))
            chosen.append(weights)
            probabilities.append(of_token)
        return torch.stack(outputs), chosen, torch.stack(probabilities)

    def balance(self, rows: Sequence[tuple[list[dict[int, Tensor]], Tensor]]) -> Tensor:
        """The balance loss of one draw: coefficient x E x sum_e f_e P_e."""
        count = self.experts.count
        slots = torch.zeros(count, dtype=torch.float64)
        for chosen, _ in rows:
            for weights in chosen:
                for expert in weights:
                    slots[expert] += 1.0
        probabilities = torch.cat([of_row for _, of_row in rows]).mean(0)
        return self.experts.balance_loss * count * (slots / slots.sum() * probabilities).sum()

    def gradients(self) -> Tensor:
        """[P], in the order of the adapter's row."""
        pool, _ = self.bank.location[self.adapter]
        row = torch.zeros(pool.row_size, dtype=torch.float64)
        for module, layout in pool.layout.items():
            for name, (start, _) in layout.items():
                gradient = self.leaves[module][name].grad
                if gradient is not None:
                    row[start : start + gradient.numel()] = gradient.flatten()
        return row
