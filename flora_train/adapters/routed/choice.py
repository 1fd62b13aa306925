"""What a router makes of its logits: the experts of each token, and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flora_train.kernels.expert_pairs import UNUSED
from flora_train.kernels.segments import Segments


class SlotRule(Protocol):
    """How many experts a token is sent to. `Experts` and `Gate` are such rules."""

    @property
    def top_k(self) -> int: ...

    @property
    def top_p(self) -> float: ...


@dataclass(frozen=True)
class Choice:
    """The experts of T tokens, in k slots each."""

    experts: Tensor
    """int64 [T, k], the most probable first; UNUSED for a slot without."""
    weights: Tensor
    """float32 [T, k], differentiable: they add up to 1; 0 in slots without expert."""
    probabilities: Tensor
    """float32 [T, E], differentiable: the softmax of the logits."""


def router_logits(tokens: Tensor, routers: Tensor, segments: Segments) -> Tensor:
    """float32 [T, E] (float64 for references): tokens [T, in] times the router [E, in] of their adapter;
    routers: [K, E, in]. The router is multiplied in float32 whatever the dtype of the tokens, also under
    autocast."""
    wide = torch.promote_types(tokens.dtype, routers.dtype)
    with torch.autocast(tokens.device.type, enabled=False):
        if len(segments) == 1:
            return F.linear(tokens.to(wide), routers[0].to(wide))
        parts = tokens.to(wide).split(segments.lengths)
        of_adapters = routers.to(wide).unbind()
        return torch.cat([F.linear(part, router) for part, router in zip(parts, of_adapters, strict=True)])


def choose(logits: Tensor, experts: SlotRule) -> Choice:
    """The top_k experts of each token; of equal ones the first.

    Their weights are their probabilities divided by the sum of these. With top_k = 1 the weight is 1, whose
    gradient would be 0: its gradient is then that of the probability (the straight-through estimator).
    """
    probabilities = logits.softmax(dim=-1)
    # A stable sort, because topk does not say which of equal values it takes. Of the logits, because
    # probabilities are equal where these differ by less than rounding.
    chosen = logits.detach().argsort(dim=-1, descending=True, stable=True)[:, : experts.top_k]
    values = probabilities.gather(1, chosen)
    if experts.top_k == 1:
        return Choice(chosen, 1.0 + (values - values.detach()), probabilities)
    if experts.top_p < 1.0:
        reached = values.detach().cumsum(dim=-1) - values.detach()
        is_used = reached < experts.top_p
        is_used[:, 0] = True
        chosen = torch.where(is_used, chosen, UNUSED)
        values = values * is_used
    return Choice(chosen, values / values.sum(dim=-1, keepdim=True), probabilities)
