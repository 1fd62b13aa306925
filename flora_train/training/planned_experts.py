"""What a feed-forward block with experts keeps for its backward, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora_train.adapters.pool import Pool
from flora_train.adapters.routed.blocks import FeedForwardBlock, hidden_states
from flora_train.adapters.spec import AdapterSpec, Experts


class PlannedLayer(Protocol):
    """A linear layer of a plan."""

    def adapted(self, x: Tensor, features: int | None, repeats: int = 1) -> Tensor:
        """The layer with adapters that keep `features` numbers for each token; the base computes x, and its
        output is used `repeats` times."""
        ...

    def kept(self, x: Tensor, y: Tensor, features: int) -> Tensor:
        """y as the output of an adapter that reads x and keeps `features` numbers for each token."""


@dataclass(frozen=True)
class ExpertShare:
    """The part of a micro-batch's rows that the adapters of a pool have."""

    pool: Pool
    share: float
    features: Mapping[str, int]
    """Layer of a block -> numbers that an expert keeps for a token, beside the layer's input."""

    @property
    def spec(self) -> AdapterSpec:
        return self.pool.specs[0]


def base_runs_once(experts: Experts) -> bool:
    """Whether the frozen layers of a block compute a token once for all its experts."""
    return experts.method != "flora"


class PlannedBlock:
    """Replaces the forward of a feed-forward block: part of the tokens go through experts."""

    def __init__(
        self,
        module: nn.Module,
        block: FeedForwardBlock,
        layers: Mapping[str, PlannedLayer],
        shares: Sequence[ExpertShare],
    ) -> None:
        self.block, self.layers, self.shares = block, layers, shares
        self._activation: Callable[[Tensor], Tensor] = getattr(module, block.activation)
        self._original = module.forward
        module.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        tokens = x.reshape(-1, x.shape[-1])
        outputs, start = [], 0
        for share in self.shares:
            end = min(start + round(share.share * len(tokens)), len(tokens))
            outputs.append(self._experts(tokens[start:end], share))
            start = end
        if start < len(tokens):
            outputs.append(self._original(tokens[start:][None])[0])
        return torch.cat(outputs).view(x.shape)

    def _experts(self, tokens: Tensor, share: ExpertShare) -> Tensor:
        """[T, d] -> [T, d], through top_k experts each."""
        experts = share.spec.experts
        assert experts is not None
        k = experts.top_k
        router = torch.zeros(experts.count, tokens.shape[1], requires_grad=True)
        probabilities = F.linear(tokens.float(), router).softmax(dim=-1)
        weights = probabilities[:, :k] / probabilities[:, :k].sum(dim=-1, keepdim=True)
        parts = []
        for name in self.block.inputs:
            features = share.features.get(name)
            if base_runs_once(experts):
                parts.append(self.layers[name].adapted(tokens, features, repeats=k))
            else:
                parts.append(self.layers[name].adapted(tokens.repeat(k, 1), features))
        hidden = hidden_states(self.block.form, self._activation, parts)
        output = self.block.output
        features = share.features.get(output)
        if not base_runs_once(experts):
            return _combined(self.layers[output].adapted(hidden, features), weights)
        layer = self.layers[output]
        if features is not None and experts.method == "ia3":
            hidden = layer.kept(hidden, 1.0 * hidden, features)
        y = layer.adapted(_combined(hidden, weights), None)
        if features is None or experts.method == "ia3":
            return y
        delta = layer.kept(hidden, y.new_zeros(len(hidden), y.shape[1]), features)
        return y + _combined(delta, weights)


def _combined(values: Tensor, weights: Tensor) -> Tensor:
    """[k T, d] -> [T, d]: the weighted sum of the experts of each token. weights: [T, k]."""
    slots = values.view(weights.shape[1], len(weights), -1)
    return (slots * weights.T[:, :, None].to(slots.dtype)).sum(0)
