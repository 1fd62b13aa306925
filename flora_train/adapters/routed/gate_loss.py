"""The loss that teaches a gate which member a row belongs to.

For an adapter with coefficient c, L layers and n learnt tokens in the whole step, it is c / (L n) x sum over
layers and learnt tokens of -log(probability of the token's member). A learnt token counts at the position
that predicts it, whose gates its own loss depends on: the last token of a prompt belongs to them, the others
of the prompt and padding do not. Every layer knows its share of the gradient, and `GateGradient` adds it in
the backward, so that it is right with every kind of activation checkpointing and whatever micro-batches a
step is divided into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flora_train.adapters.routing import Routing, Span


@dataclass(frozen=True)
class TokenGoals:
    """What the gates of the tokens of a span are to choose."""

    members: Tensor
    """int64 [T]; 0 for tokens without goal."""
    weights: Tensor
    """float64 [T]: coefficient of each token's cross-entropy in a layer; 0 for tokens without goal."""


def goal_positions(
    documents: Sequence[tuple[int, NDArray[np.int32]]], members: Sequence[int]
) -> NDArray[np.int64]:
    """int64 [tokens of a row]: the member that each position is to choose, -1 for none.

    documents: (tokens, learnt spans [s, 2]) of each document of the row; members: that of each.
    """
    goals = np.full(sum(length for length, _ in documents), -1, dtype=np.int64)
    start = 0
    for (length, spans), member in zip(documents, members, strict=True):
        for begin, end in spans:
            goals[start + begin - 1 : start + end - 1] = member
        start += length
    return goals


def token_goals(routing: Routing, span: Span, tokens_per_row: int, device: torch.device) -> TokenGoals | None:
    """The goals of a span; None if none of its rows has one. Made once for all layers."""
    key = ("goals", id(span.pool), span.start, tokens_per_row)
    if key not in routing.loads:
        routing.loads[key] = _token_goals(routing, span, tokens_per_row, device)
    return cast("TokenGoals | None", routing.loads[key])


def _token_goals(
    routing: Routing, span: Span, tokens_per_row: int, device: torch.device
) -> TokenGoals | None:
    if routing.goals is None or span.pool is None:
        return None
    rows = routing.goals[span.start : span.end]
    if all(row is None for row in rows):
        return None
    members = np.zeros((len(rows), tokens_per_row), dtype=np.int64)
    weights = np.zeros((len(rows), tokens_per_row))
    for number, row in enumerate(rows):
        if row is not None:
            goals = row.members[:tokens_per_row]
            members[number, : len(goals)] = np.maximum(goals, 0)
            weights[number, : len(goals)] = (goals >= 0) * (row.share / len(span.pool.targets))
    return TokenGoals(
        torch.from_numpy(members).flatten().to(device), torch.from_numpy(weights).flatten().to(device)
    )


class GateGradient(torch.autograd.Function):
    """y unchanged; the backward adds the gradient of the weighted cross-entropy to that of the logits."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, logits: Tensor, goals: TokenGoals) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.goals = goals
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        goals: TokenGoals = ctx.goals
        dlogits = logits.softmax(dim=-1)
        dlogits[torch.arange(len(dlogits), device=dlogits.device), goals.members] -= 1.0
        # A token without goal adds nothing, also where its logits are not finite.
        weights = goals.weights[:, None].to(dlogits.dtype)
        return dy, torch.where(weights != 0, dlogits * weights, 0.0), None


def with_gate_loss(
    y: Tensor, logits: Tensor, module: str, routing: Routing, span: Span, *, tokens_per_row: int
) -> Tensor:
    """y, with the gradient of the loss of the gate on a layer, which is recorded.

    y: [T, out]; logits: [T, N] of the gate.
    """
    goals = token_goals(routing, span, tokens_per_row, y.device)
    if goals is None:
        return y
    losses = _recorded(routing, span)
    with torch.no_grad():  # again the same in a recomputed forward
        losses[module] = F.cross_entropy(logits, goals.members, reduction="none").double() * goals.weights
    return GateGradient.apply(y, logits, goals) if torch.is_grad_enabled() else y


def gate_losses(routing: Routing) -> dict[str, Tensor]:
    """Adapter -> the loss of its gates in this forward pass, with the coefficient: the share of the step's
    loss that the rows of this batch are."""
    losses: dict[str, Tensor] = {}
    for span in routing.spans:
        for of_tokens in _recorded(routing, span).values():
            per_row = len(of_tokens) // (span.end - span.start)
            for k, first, end in span.segments.scaled(per_row):
                name = span.specs[k].name
                losses[name] = losses.get(name, of_tokens.new_zeros(())) + of_tokens[first:end].sum()
    return losses


def _recorded(routing: Routing, span: Span) -> dict[str, Tensor]:
    """Layer -> the losses [T] of its gate in this forward pass."""
    losses = routing.loads.setdefault(("gate losses", id(span.pool), span.start), {})
    return cast("dict[str, Tensor]", losses)
