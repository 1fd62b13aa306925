"""The load-balance loss of routers.

For one draw of an adapter, over the tokens of all its rows without padding and over all L routers together:
coefficient x E x sum_e f_e P_e, where f_e is the share of the slots that hold expert e and P_e its mean
probability. An adapter's loss has the mean over its draws of the step. f has no gradient, so that the gradient
of a probability is known once all routers have run: `BalanceGradient` adds it in the backward. It is right with
every kind of activation checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """float32 [D]: tokens of each draw."""
    shares: Tensor
    """float32 [D]: the share of each draw in its adapter's loss."""
    adapters: tuple[int, ...]
    """[D]: which of the span's adapters each draw belongs to."""

    @property
    def draws(self) -> int:
        """D."""
        return len(self.counts)


@dataclass(frozen=True)
class Load:
    """The load of one router in a forward pass."""

    slots: Tensor
    """float32 [D, E]: shares of the slots, f."""
    probabilities: Tensor
    """float32 [D, E]: mean probabilities, P."""


def real_tokens(routing: Routing, span: Span, tokens_per_row: int, device: torch.device) -> Tensor | None:
    """bool [T]: which tokens of a span are no padding; None if there is no padding."""
    if routing.lengths is None:
        return None
    lengths = torch.tensor(routing.lengths[span.start : span.end], device=device)
    positions = torch.arange(tokens_per_row, device=device)
    return (positions[None] < lengths[:, None]).flatten()


def draw_tokens(routing: Routing, span: Span, tokens_per_row: int, device: torch.device) -> DrawTokens | None:
    """The draws of a span; None if none of its rows belongs to one. Made once for all layers."""
    key = ("draws", id(span.pool), span.start, tokens_per_row)
    if key not in routing.loads:
        routing.loads[key] = _draw_tokens(routing, span, tokens_per_row, device)
    return routing.loads[key]


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
    return DrawTokens(draws, counts.float(), torch.tensor(shares, device=device), adapters)


def load_of(choice: Choice, tokens: DrawTokens) -> Load:
    """The load that the choices of a router are, draw by draw."""
    count = choice.probabilities.shape[1]
    chosen = choice.experts.flatten()
    draw = tokens.draw.repeat_interleave(choice.experts.shape[1])
    cell = torch.where(chosen == UNUSED, tokens.draws * count, draw * count + chosen)
    slots = cell.bincount(minlength=(tokens.draws + 1) * count)[: tokens.draws * count]
    slots = slots.view(tokens.draws, count).float()
    sums = choice.probabilities.new_zeros(tokens.draws + 1, count)
    sums.index_add_(0, tokens.draw, choice.probabilities.detach())
    return Load(
        slots / slots.sum(dim=1, keepdim=True).clamp_min(1.0),
        sums[: tokens.draws] / tokens.counts[:, None].clamp_min(1.0),
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
    """float32 [T, E]: the gradient of the balance loss in the probabilities of one router, once all routers
    of the span have run."""
    experts = span.specs[0].experts
    assert experts is not None
    loads = recorded_loads(routing, span)
    slots = torch.stack([load.slots for load in loads]).mean(0)
    factor = experts.balance_loss * experts.count / len(loads)
    of_draws = slots * (factor * tokens.shares / tokens.counts.clamp_min(1.0))[:, None]
    of_draws = torch.cat([of_draws, of_draws.new_zeros(1, experts.count)])
    return of_draws[tokens.draw]


def recorded_loads(routing: Routing, span: Span) -> list[Load]:
    """The loads of all routers of a span in this forward pass."""
    key = ("loads", id(span.pool), span.start)
    return list(routing.loads.get(key, {}).values())


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
    loads = routing.loads.setdefault(("loads", id(span.pool), span.start), {})
    loads[module] = load_of(choice, tokens)  # again the same in a recomputed forward
    return tokens


def balance_losses(routing: Routing) -> dict[str, Tensor]:
    """Adapter -> its balance loss in this forward pass: the share of the step's mean that the rows of this
    batch are."""
    losses: dict[str, Tensor] = {}
    for span in routing.spans:
        loads = recorded_loads(routing, span) if span.pool is not None else []
        experts = span.specs[0].experts if span.specs else None
        if not loads or experts is None:
            continue
        key = next(
            k for k in routing.loads if isinstance(k, tuple) and k[:3] == ("draws", id(span.pool), span.start)
        )
        tokens: DrawTokens = routing.loads[key]
        slots = torch.stack([load.slots for load in loads]).mean(0)
        probabilities = torch.stack([load.probabilities for load in loads]).mean(0)
        values = experts.balance_loss * experts.count * (slots * probabilities).sum(1) * tokens.shares
        for place, k in enumerate(tokens.adapters):
            name = span.specs[k].name
            losses[name] = losses.get(name, 0.0) + values[place]
    return losses
