"""Gives the choices of routers and gates to whoever records them."""

from __future__ import annotations

import torch

from flora_train.adapters.routed.balance import real_tokens
from flora_train.adapters.routed.choice import Choice
from flora_train.adapters.routing import RouteRecorder, Routing, Span


@torch.no_grad()
def record_choice(
    recorder: RouteRecorder | None,
    choice: Choice,
    module: str,
    *,
    routing: Routing,
    span: Span,
    tokens_per_row: int,
) -> None:
    """Pass on the choices of the router in `module`, adapter by adapter, without those of the padding."""
    if recorder is None:
        return
    real = real_tokens(routing, span, tokens_per_row, choice.experts.device)
    for k, first, end in span.segments.scaled(tokens_per_row):
        part = slice(first, end)
        experts, probabilities = choice.experts[part], choice.probabilities[part]
        if real is not None:
            experts, probabilities = experts[real[part]], probabilities[real[part]]
        recorder.add(span.specs[k], module, experts=experts, probabilities=probabilities)
