"""A slow MixLoRA, written from the paper's formulas: loops over tokens and over whole feed-forward blocks.

Source: Li et al., "MixLoRA" (arXiv 2404.15159), eq. 3 to 8. A block is the model's own module, which runs
once for every token and expert, with the adapters of that expert on its linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora_train.adapters.spec import AdapterSpec

Params = Mapping[str, Mapping[str, Tensor]]
"""Module -> parameter -> values."""


class SlowLinear(nn.Module):
    """A linear layer with an adapter: its only one, or that of `expert`."""

    def __init__(
        self, layer: nn.Module, params: Mapping[str, Tensor], spec: AdapterSpec, is_down: bool
    ) -> None:
        super().__init__()
        self.base, self.params, self.spec, self.is_down = layer, params, spec, is_down
        self.expert: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        params = self.params
        if self.expert is not None:
            params = {name: stack[self.expert] for name, stack in params.items()}
        weight: Any = self.base.weight
        if isinstance(self.base, Conv1D):
            weight = weight.T
        bias = 0.0 if self.base.bias is None else self.base.bias
        assert self.spec.experts is not None
        method = self.spec.experts.method
        if not params:
            return x @ weight.T + bias
        if method == "lora":
            return x @ weight.T + bias + self.spec.scaling * (x @ params["A"].T) @ params["B"].T
        if method == "flora":
            return x @ (weight * (1.0 + params["B"] @ params["A"])).T + bias
        if self.is_down:
            return (x * params["l"]) @ weight.T + bias
        return (x @ weight.T + bias) * params["l"]


class SlowBlock(nn.Module):
    """sum_e w_e FFN_e(x) for every token; records probabilities and experts."""

    def __init__(
        self, module: nn.Module, router: Tensor, spec: AdapterSpec, layers: list[SlowLinear]
    ) -> None:
        super().__init__()
        self.module, self.router, self.spec, self.layers = module, router, spec, layers
        self.probabilities: list[Tensor] = []
        self.chosen: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, d]."""
        return torch.stack([self._token(token) for token in x[0]])[None]

    def _token(self, x: Tensor) -> Tensor:
        experts = self.spec.experts
        assert experts is not None
        p = torch.softmax(self.router @ x, dim=0)
        values: list[float] = p.tolist()
        best: list[int] = []
        reached = 0.0
        for e in sorted(range(experts.count), key=lambda e: (-values[e], e))[: experts.top_k]:
            if best and reached >= experts.top_p:
                break
            best.append(e)
            reached += values[e]
        self.probabilities.append(p)
        self.chosen.append(best)
        total = torch.stack([p[e] for e in best]).sum()
        y = torch.zeros_like(x)
        for e in best:
            for layer in self.layers:
                layer.expert = e
            weight = p[e] / total
            if experts.top_k == 1:  # straight through: 1, with the gradient of the probability
                weight = 1.0 + p[e] - p[e].detach()
            y = y + weight * self.module(x[None, None])[0, 0]
        return y


@dataclass
class SlowModel:
    """A model with one routed adapter, for one row at a time."""

    model: Any
    blocks: list[SlowBlock] = field(default_factory=list)

    def logits(self, tokens: Tensor) -> Tensor:
        """[T, V] of tokens [T]."""
        return self.model(input_ids=tokens[None]).logits[0]

    def take_loads(self) -> list[tuple[list[Tensor], list[list[int]]]]:
        """The probabilities and experts that each block has recorded, which are forgotten."""
        loads = [(block.probabilities, block.chosen) for block in self.blocks]
        for block in self.blocks:
            block.probabilities, block.chosen = [], []
        return loads


def slow_model(model: nn.Module, spec: AdapterSpec, params: Params, outputs: tuple[str, ...]) -> SlowModel:
    """The model with an adapter of these parameters. outputs: endings of the layers that make the output of a
    feed-forward block. The model is changed."""
    slow = SlowModel(model)
    layers: dict[str, SlowLinear] = {}
    blocks = [name for name in params if "router" in params[name]]
    for name, module in list(model.named_modules()):
        in_block = any(name.startswith(f"{block}.") for block in blocks)
        is_linear = isinstance(module, nn.Linear | Conv1D)
        if is_linear and (name in params or in_block):
            is_down = in_block and name.endswith(outputs)
            layers[name] = SlowLinear(module, params.get(name, {}), spec, is_down)
            model.set_submodule(name, layers[name])
    for name in blocks:
        own = [layer for path, layer in layers.items() if path.startswith(f"{name}.")]
        block = SlowBlock(model.get_submodule(name), params[name]["router"], spec, own)
        model.set_submodule(name, block)
        slow.blocks.append(block)
    return slow


def slow_balance(loads: list[tuple[list[Tensor], list[list[int]]]], spec: AdapterSpec) -> Tensor:
    """coefficient E sum_e f_e P_e over the tokens of a draw in all blocks."""
    experts = spec.experts
    assert experts is not None
    shares, means = [], []
    for probabilities, chosen in loads:
        slots = [0.0] * experts.count
        for best in chosen:
            for e in best:
                slots[e] += 1.0
        shares.append([count / sum(slots) for count in slots])
        means.append(torch.stack(probabilities).mean(0))
    f = torch.tensor(shares, dtype=means[0].dtype).mean(0)
    return experts.balance_loss * experts.count * (f * torch.stack(means).mean(0)).sum()
