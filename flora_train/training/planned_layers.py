"""Stand-ins of adapted layers in a plan: they run without data, keep what the adapters' kernels keep, and say
their operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flora_train.adapters.fused_experts import ExpertLayout
from flora_train.adapters.methods import Target


class _KeepsAsAdapter(torch.autograd.Function):
    """Keeps the input of an adapted layer and `features` more numbers for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, parameter: Tensor, features: int) -> Tensor:
        rows = x.numel() // x.shape[-1]
        ctx.save_for_backward(x, y.new_empty(rows, features))
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None, None]:
        raise NotImplementedError("only the forward of a plan runs")


class PlannedLinear(nn.Module):
    """A frozen linear layer, with what its adapters keep."""

    def __init__(self, base: nn.Module, target: Target, features: int | None) -> None:
        super().__init__()
        self.base, self.features = base, features
        self.in_features, self.out_features = target.in_features, target.out_features
        self.parameter = nn.Parameter(torch.zeros(1))
        self.flops = 0
        """Floating point operations of the layer so far."""

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x, self.features)

    def adapted(self, x: Tensor, features: int | None, repeats: int = 1) -> Tensor:
        """The layer with adapters that keep `features` numbers for each token; the base computes x, and its
        output is used `repeats` times."""
        self.flops += 2 * x.numel() * self.out_features
        y = self.base(x)
        if repeats > 1:
            x, y = x.repeat(repeats, 1), y.repeat(repeats, 1)
        return y if features is None else self.kept(x, y, features)

    def kept(self, x: Tensor, y: Tensor, features: int) -> Tensor:
        """y as the output of an adapter that reads x and keeps `features` numbers for each token."""
        return _KeepsAsAdapter.apply(x, y, self.parameter, features)


class PlannedExperts(nn.Module):
    """Frozen fused experts, with what their adapters keep."""

    def __init__(self, base: nn.Module, layout: ExpertLayout, features: int | None) -> None:
        super().__init__()
        self.base, self.features = base, features
        """features: numbers that are kept for each pair of a token and an expert."""
        self.weights_of_expert = sum(getattr(base, part)[0].numel() for part in layout.weights)
        self.parameter = nn.Parameter(torch.zeros(1))
        self.flops = 0
        """Floating point operations of the experts so far."""

    def forward(self, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        self.flops += 2 * experts.numel() * self.weights_of_expert
        y = self.base(hidden_states, experts, weights)
        if self.features is None:
            return y
        features = self.features * experts.shape[1]
        return _KeepsAsAdapter.apply(hidden_states, y, self.parameter, features)
