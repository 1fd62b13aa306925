"""Pairs of a token and an expert that it is sent to, grouped by expert, and conversions between both.

Dimensions: T tokens, K adapters (segments of tokens) of E experts each, k slots of a token, P pairs, d
features. An expert's tokens are consecutive, so that the kernels of plain adapters compute all experts of all
adapters at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import autocast_disabled, no_autocast
from flora_train.kernels.segments import Segments

UNUSED = -1
"""Stands for an expert in a slot that a token does not use."""


@dataclass(frozen=True)
class Pairs:
    """The pairs of T tokens, grouped by adapter and expert."""

    tokens: Tensor
    """int64 [P]: the token of each pair."""
    position: Tensor
    """int64 [T, k]: the pair of each slot of a token; P for a slot that is not used."""
    segments: Segments
    """K E segments of P pairs: expert e of adapter k is segment k E + e. Some are empty."""
    all_used: bool
    """Whether every slot is used, so that P = T k."""
    stacks: Tensor | None = None
    """int64 [P]: where every pair is a segment of its own, the expert of each, k E + e. None: segment i is
    expert i."""

    @property
    def count(self) -> int:
        """P."""
        return self.segments.tokens


def group_pairs(experts: Tensor, segments: Segments, count: int) -> Pairs:
    """The pairs of these tokens.

    Args:
        experts: int64 [T, k], the experts of each token, from 0 to `count` - 1; UNUSED for a slot without.
            No expert twice for a token.
        segments: K segments of T tokens: the tokens of each adapter.
        count: E.

    Waits for the device once, because the kernels need the number of tokens of every expert on the host.
    """
    slots = experts.shape[1]
    groups = len(segments) * count
    first = torch.tensor([k * count for k in range(len(segments))], device=experts.device)
    lengths = torch.tensor(segments.lengths, device=experts.device)
    segment = experts + first.repeat_interleave(lengths)[:, None]
    segment = torch.where(experts == UNUSED, groups, segment).flatten()
    order = segment.argsort(stable=True)
    counts = segment.bincount(minlength=groups + 1).tolist()
    bounds = [0]
    for length in counts[:groups]:
        bounds.append(bounds[-1] + length)
    used = bounds[-1]
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device).clamp_(max=used)
    return Pairs(
        tokens=order[:used].div(slots, rounding_mode="floor"),
        position=position.view(-1, slots),
        segments=Segments(tuple(bounds)),
        all_used=counts[groups] == 0,
    )


def pairs_in_order(experts: Tensor, segments: Segments, count: int) -> Pairs:
    """The pairs of few tokens in the order of the tokens, each a segment of its own: without sorting, and
    without waiting for the device. Unused slots are pairs, too, with any expert; their weight is 0.

    Args and fields as in `group_pairs`.
    """
    slots = experts.shape[1]
    stacks = experts.clamp_min(0)
    if len(segments) > 1:
        first = torch.tensor([k * count for k in range(len(segments))], device=experts.device)
        lengths = torch.tensor(segments.lengths, device=experts.device)
        stacks = stacks + first.repeat_interleave(lengths)[:, None]
    position = torch.arange(experts.numel(), device=experts.device).view(-1, slots)
    tokens = position.div(slots, rounding_mode="floor").flatten()
    alone = Segments(tuple(range(experts.numel() + 1)))
    return Pairs(tokens, position, alone, all_used=True, stacks=stacks.flatten())


class GatherPairs(torch.autograd.Function):
    """[T, d] -> [P, d]: the token of each pair. The backward sums the slots of a token in their order, so
    that it does not depend on how a device adds."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return tokens.index_select(0, pairs.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpairs: Tensor) -> tuple[Tensor, None]:
        return _by_slot(dpairs, ctx.pairs).sum(1), None


class CombinePairs(torch.autograd.Function):
    """[P, d] and weights [T, k] -> [T, d]: the weighted sum over the slots of each token."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(values, weights)
        ctx.pairs = pairs
        slots = _by_slot(values, pairs)
        with no_autocast(values):
            return torch.bmm(weights.to(values.dtype)[:, None], slots)[:, 0]

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dtokens: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, weights = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        dvalues: Tensor | None = None
        dweights: Tensor | None = None
        if ctx.needs_input_grad[0]:
            of_pairs = weights.new_empty(pairs.count + 1)
            of_pairs[pairs.position] = weights
            dvalues = dtokens.index_select(0, pairs.tokens)
            dvalues = dvalues * of_pairs[: pairs.count, None].to(dvalues.dtype)
        if ctx.needs_input_grad[1]:
            dweights = torch.bmm(_by_slot(values, pairs), dtokens[:, :, None])[:, :, 0].to(weights.dtype)
        return dvalues, dweights, None


def gather_pairs(tokens: Tensor, pairs: Pairs) -> Tensor:
    """[T, d] -> [P, d]: the token of each pair, differentiable."""
    return GatherPairs.apply(tokens, pairs)


def combine_pairs(values: Tensor, weights: Tensor, pairs: Pairs) -> Tensor:
    """[P, d] -> [T, d]: the sum of the slots of each token, times their weights [T, k]. Differentiable in
    both."""
    return CombinePairs.apply(values, weights, pairs)


def _by_slot(values: Tensor, pairs: Pairs) -> Tensor:
    """[P, d] -> [T, k, d]: 0 for a slot that is not used."""
    if not pairs.all_used:
        values = torch.cat([values, values.new_zeros(1, values.shape[1])])
    slots = pairs.position.shape[1]
    return values.index_select(0, pairs.position.flatten()).view(-1, slots, values.shape[1])
