"""The load-balance loss of routers.

For one draw of an adapter, over the tokens of all its rows without padding and over all routers together, it
is coefficient x E x sum_e f_e P_e, where f_e is the share of the slots that hold expert e, and P_e its mean
probability. An adapter's loss has the mean over its draws of the step. f has no gradient, so that the
gradient of a probability is known once all routers have run: `BalanceGradient` adds it in the backward, with
every kind of activation checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.adapters.routed.choice import Choice
from flora_train.adapters.routing import Routing, Span
from flora_train.kernels.expert_pairs import UNUSED


@dataclass(frozen=True)
class DrawTokens:
    """The tokens of a span, by the draw that they belong to."""

    draw: Tensor
    """int64 [T]: position of each token's draw; D for padding and rows without a draw."""
    counts: Tensor
    """float64 [D]: tokens of each draw."""
    shares: Tensor
    """float64 [D]: the share of each draw in its adapter's loss."""
    adapters: tuple[int, ...]
    """[D]: which of the span's adapters each draw belongs to."""

    @property
    def draws(self) -> int:
        """D."""
        return len(self.counts)


@dataclass(frozen=True)
class Load:
    """The load of one router in a forward pass, in the dtype of its probabilities."""

    slots: Tensor
    """[D, E]: shares of the slots, f."""
    probabilities: Tensor
    """[D, E]: mean probabilities, P."""
    tokens: DrawTokens


def real_tokens(routing: Routing, span: Span, tokens_per_row: int, device: torch.device) -> Tensor | None:
    """bool [T]: which tokens of a span are no padding; None if there is no padding."""
    if routing.lengths is None:
        return None
    lengths = torch.tensor(routing.lengths[span.start : span.end], device=device)
    positions = torch.arange(tokens_per_row, device=device)
    return (positions[None] < lengths[:, None]).flatten()


def draw_tokens(routing: Routing, span: Span, tokens_per_row: int, device: torch.device) -> DrawTokens | None:
    """The draws of a span; None if none of its rows belongs to one. Made once for all layers."""
    key = _key("draws", span)
    if key not in routing.loads:
        routing.loads[key] = _draw_tokens(routing, span, tokens_per_row, device)
    return cast("DrawTokens | None", routing.loads[key])


def _draw_tokens(
    routing: Routing, span: Span, tokens_per_row: int, device: torch.device
) -> DrawTokens | None:
    if routing.draws is None:
        return None
    places: dict[tuple[int, int], int] = {}
    shares: list[float] = []
    row_draws: list[int] = []
    for k, first, end in span.segments:
        for row in range(span.start + first, span.start + end):
            draw = routing.draws[row]
            if draw is None:
                row_draws.append(-1)
                continue
            if (k, draw.number) not in places:
                places[k, draw.number] = len(places)
                shares.append(draw.share)
            row_draws.append(places[k, draw.number])
    if not places:
        return None
    draws = torch.tensor(row_draws, device=device).repeat_interleave(tokens_per_row)
    draws = torch.where(draws < 0, len(places), draws)
    real = real_tokens(routing, span, tokens_per_row, device)
    if real is not None:
        draws = torch.where(real, draws, len(places))
    counts = draws.bincount(minlength=len(places) + 1)[: len(places)]
    adapters = tuple(k for k, _ in places)
    of_draws = torch.tensor(shares, dtype=torch.float64, device=device)
    return DrawTokens(draws, counts.double(), of_draws, adapters)


def load_of(choice: Choice, tokens: DrawTokens) -> Load:
    """The load that the choices of a router are, draw by draw."""
    count = choice.probabilities.shape[1]
    chosen = choice.experts.flatten()
    draw = tokens.draw.repeat_interleave(choice.experts.shape[1])
    cell = torch.where(chosen == UNUSED, tokens.draws * count, draw * count + chosen)
    slots = cell.bincount(minlength=(tokens.draws + 1) * count)[: tokens.draws * count]
    slots = slots.view(tokens.draws, count).to(choice.probabilities.dtype)
    sums = choice.probabilities.new_zeros(tokens.draws + 1, count)
    sums.index_add_(0, tokens.draw, choice.probabilities.detach())
    counts = tokens.counts.to(sums.dtype)
    return Load(
        slots / slots.sum(dim=1, keepdim=True).clamp_min(1.0),
        sums[: tokens.draws] / counts[:, None].clamp_min(1.0),
        tokens,
    )


class BalanceGradient(torch.autograd.Function):
    """y unchanged; the backward adds the gradient of the balance loss to that of the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, probabilities: Tensor, routing: Routing, span: Span, tokens: DrawTokens
    ) -> Tensor:
        ctx.of_forward = routing, span, tokens
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        routing, span, tokens = ctx.of_forward
        return dy, probability_gradient(routing, span, tokens), None, None, None


def probability_gradient(routing: Routing, span: Span, tokens: DrawTokens) -> Tensor:
    """[T, E]: the gradient of the balance loss in the probabilities of one router, once all routers of the
    span have run."""
    experts = span.specs[0].experts
    assert experts is not None
    loads = recorded_loads(routing, span)
    slots = torch.stack([load.slots for load in loads]).mean(0)
    factor = experts.balance_loss * experts.count / len(loads)
    weights = factor * tokens.shares / tokens.counts.clamp_min(1.0)
    of_draws = slots * weights.to(slots.dtype)[:, None]
    of_draws = torch.cat([of_draws, of_draws.new_zeros(1, experts.count)])
    return of_draws[tokens.draw]


def recorded_loads(routing: Routing, span: Span) -> list[Load]:
    """The loads of all routers of a span in this forward pass."""
    loads = cast("dict[str, Load]", routing.loads.get(_key("loads", span), {}))
    return list(loads.values())


def with_balance(
    y: Tensor, choice: Choice, module: str, routing: Routing, span: Span, *, tokens_per_row: int
) -> Tensor:
    """y, with the gradient of the balance loss of the router in `module`, whose load is recorded."""
    tokens = record_load(choice, module, routing, span, tokens_per_row=tokens_per_row)
    if tokens is None:
        return y
    return BalanceGradient.apply(y, choice.probabilities, routing, span, tokens)


def record_load(
    choice: Choice, module: str, routing: Routing, span: Span, *, tokens_per_row: int
) -> DrawTokens | None:
    """Record the load of a router in this forward pass. Returns the tokens that it was measured on; None if
    the load is not balanced."""
    experts = span.specs[0].experts
    if routing.draws is None or experts is None or not experts.balance_loss:
        return None
    tokens = draw_tokens(routing, span, tokens_per_row, choice.experts.device)
    if tokens is None:
        return None
    loads = cast("dict[str, Load]", routing.loads.setdefault(_key("loads", span), {}))
    loads[module] = load_of(choice, tokens)  # again the same in a recomputed forward
    return tokens


def balance_losses(routing: Routing) -> dict[str, Tensor]:
    """The balance losses of a forward pass.

    Args:
        routing: Of a forward pass that has ended, whose rows belong to draws.

    Returns:
        Adapter name -> the part of its balance loss that the rows of this batch are, a number of the dtype of
        the router's probabilities. The parts of a step add up to the mean over its draws.
    """
    losses: dict[str, Tensor] = {}
    for span in routing.spans:
        loads = recorded_loads(routing, span)
        if not loads:
            continue
        experts, tokens = span.specs[0].experts, loads[0].tokens
        assert experts is not None
        slots = torch.stack([load.slots for load in loads]).mean(0)
        probabilities = torch.stack([load.probabilities for load in loads]).mean(0)
        products = (slots * probabilities).sum(1) * tokens.shares
        values = experts.balance_loss * experts.count * products
        for place, k in enumerate(tokens.adapters):
            name = span.specs[k].name
            losses[name] = losses[name] + values[place] if name in losses else values[place]
    return losses


def _key(what: str, span: Span) -> tuple[str, int, int]:
    """What the loads of a routing are stored under for a span."""
    return what, id(span.pool), span.start
