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
    """Whether the frozen input layers of a block compute a token once for all its experts."""
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
        values = self.layers[output].adapted(hidden, share.features.get(output))
        slots = values.view(k, len(tokens), -1)
        return (slots * weights.T[:, :, None].to(slots.dtype)).sum(0)
