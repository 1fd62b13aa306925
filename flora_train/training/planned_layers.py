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

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def flops(self, args: tuple[Any, ...]) -> int:
        """Of a forward with these arguments."""
        inputs: Tensor = args[0]
        return 2 * inputs.numel() * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.features is None:
            return y
        return _KeepsAsAdapter.apply(x, y, self.parameter, self.features)


class PlannedExperts(nn.Module):
    """Frozen fused experts, with what their adapters keep."""

    def __init__(self, base: nn.Module, layout: ExpertLayout, features: int | None) -> None:
        super().__init__()
        self.base, self.features = base, features
        """features: numbers that are kept for each pair of a token and an expert."""
        self.weights_of_expert = sum(getattr(base, part)[0].numel() for part in layout.weights)
        self.parameter = nn.Parameter(torch.zeros(1))

    def flops(self, args: tuple[Any, ...]) -> int:
        """Of a forward with these arguments."""
        experts: Tensor = args[1]
        return 2 * experts.numel() * self.weights_of_expert

    def forward(self, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        y = self.base(hidden_states, experts, weights)
        if self.features is None:
            return y
        features = self.features * experts.shape[1]
        return _KeepsAsAdapter.apply(hidden_states, y, self.parameter, features)
