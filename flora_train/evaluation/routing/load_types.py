"""Types of the load of experts in report.json."""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from flora_train.evaluation.result_model import Count, Number, ResultModel, Text

Share = Annotated[Number, Field(ge=0, le=1)]


class LayerLoad(ResultModel):
    """What one router of an adapter chose."""

    module: Text
    """The module whose input it reads."""
    shares: Annotated[tuple[Share, ...], Field(min_length=1)]
    """Of each expert: its share of all choices, of which a token makes as many as it has experts."""
    entropy: Annotated[Number, Field(ge=0)]
    """Mean over tokens of the entropy of the router's probabilities, in nats."""


class ExpertLoad(ResultModel):
    """The load of a routed adapter's experts on held-out texts of its task."""

    adapter: Text
    task: Text
    examples: Count
    """Held-out examples that were read."""
    tokens: Count
    """Their tokens, without padding."""
    top_k: Count
    layers: Annotated[tuple[LayerLoad, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _has_the_same_experts_everywhere(self) -> Self:
        if len({len(layer.shares) for layer in self.layers}) > 1:
            raise ValueError(f"layers of {self.adapter} have different numbers of experts")
        return self

    @property
    def experts(self) -> int:
        """Their number in one layer."""
        return len(self.layers[0].shares)

    @property
    def busiest(self) -> float:
        """The largest share of an expert in any layer."""
        return max(max(layer.shares) for layer in self.layers)

    @property
    def least(self) -> float:
        """The smallest share of an expert in any layer."""
        return min(min(layer.shares) for layer in self.layers)

    @property
    def dead(self) -> int:
        """Experts, over all layers, that no token was sent to."""
        return sum(layer.shares.count(0.0) for layer in self.layers)

    @property
    def entropy(self) -> float:
        """Mean over the layers, in nats."""
        return math.fsum(layer.entropy for layer in self.layers) / len(self.layers)

    @property
    def largest_entropy(self) -> float:
        """That of equal probabilities."""
        return math.log(self.experts)
