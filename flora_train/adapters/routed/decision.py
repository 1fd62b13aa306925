"""The decision of a switch adapter: the experts of each token, made once in a forward for all layers.

It is kept until the next forward, also where activation checkpointing runs layers again in the backward. The
weights have a graph of their own, from the detached input of the first adapted layer (below it nothing of the
adapter is learnt) to the router: all layers use a leaf in their place, whose gradient a hook passes on. So it
does not matter in how many parts a backward computes the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

import torch
from torch import Tensor

from flora_train.adapters.methods.routed import ROUTER
from flora_train.adapters.routed.balance import (
    DrawTokens,
    probability_gradient,
    record_load,
)
from flora_train.adapters.routed.choice import Choice, choose, router_logits
from flora_train.adapters.routed.jitter import jittered
from flora_train.adapters.routed.recording import record_choice
from flora_train.adapters.routing import BatchRouting, Routing, Span
from flora_train.kernels.expert_pairs import Pairs, group_pairs
from flora_train.kernels.segments import Segments


@dataclass(frozen=True)
class Decision:
    """The experts of the T tokens of a span, in all layers."""

    choice: Choice
    """Its weights are a leaf of their own where there will be a backward."""
    segments: Segments
    """The tokens of each adapter."""
    experts: int
    """E."""
    tokens_per_row: int

    @cached_property
    def pairs(self) -> Pairs:
        """The pairs of a token and an expert, grouped once for all layers."""
        return group_pairs(self.choice.experts, self.segments, self.experts)


def decision_of(routing: Routing, span: Span, module: str, tokens_per_row: int) -> Decision:
    """The decision that the first layer made in this forward. Raises RuntimeError where the layer `module`
    cannot use one."""
    decision = cast("Decision | None", routing.loads.get(_key(span)))
    if decision is None:
        raise RuntimeError(f"{module} ran before the first adapted layer, which decides about the experts")
    if decision.tokens_per_row != tokens_per_row:
        lengths = f"{tokens_per_row} tokens of a row, and the first adapted layer {decision.tokens_per_row}"
        raise RuntimeError(f"{module} got {lengths}: one decision cannot hold in both")
    return decision


def decide(
    x: Tensor, module: str, routing: Routing, span: Span, *, router: BatchRouting, tokens_per_row: int
) -> None:
    """Decide about the tokens x [T, in] of a span, which the first layer `module` reads; in a backward, which
    runs layers again, the decision of the forward stays."""
    if _key(span) in routing.loads and _in_backward():
        return
    assert span.pool is not None
    assert span.slots is not None
    experts = span.specs[0].experts
    assert experts is not None
    learns, segments = router.learns, span.segments.scaled(tokens_per_row)
    with _own_graph(learns):
        routers = span.pool.gather_one(module, ROUTER, span.slots)
        read = jittered(x.detach(), module, routing, span, tokens_per_row=tokens_per_row)
        choice = choose(router_logits(read, routers, segments), experts)
        if router.given_routes is not None:
            choice = with_routes(choice, router.given_routes(len(x)))
    record_choice(router.recorder, choice, module, routing=routing, span=span, tokens_per_row=tokens_per_row)
    if learns:
        tokens = record_load(choice, module, routing, span, tokens_per_row=tokens_per_row)
        weights = choice.weights.detach().requires_grad_()
        weights.register_hook(_Backward(choice, routing, span, tokens))
        choice = replace(choice, weights=weights)
    routing.loads[_key(span)] = Decision(choice, segments, experts.count, tokens_per_row)


def with_routes(choice: Choice, routes: Sequence[Sequence[int]]) -> Choice:
    """The choice of these experts [T][k] in place of the router's, with their own weights."""
    experts = torch.tensor(routes, device=choice.experts.device)
    values = choice.probabilities.gather(1, experts)
    return replace(choice, experts=experts, weights=values / values.sum(dim=-1, keepdim=True))


class _Backward:
    """Passes the gradient of the weights on to the router, and once in a forward that of the balance loss."""

    def __init__(self, choice: Choice, routing: Routing, span: Span, tokens: DrawTokens | None) -> None:
        self._choice = choice
        self._balance = None if tokens is None else partial(probability_gradient, routing, span, tokens)

    def __call__(self, gradient: Tensor) -> None:
        outputs, gradients = [self._choice.weights], [gradient]
        if self._balance is not None:
            outputs.append(self._choice.probabilities)
            gradients.append(self._balance())
            self._balance = None
        # Again for every part of a backward that reentrant checkpointing divides.
        torch.autograd.backward(outputs, gradients, retain_graph=True)


def _key(span: Span) -> tuple[str, int]:
    """The only span of a pool in a routing, also in one of a part of its rows."""
    return "decision", id(span.pool)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@contextmanager
def _own_graph(learns: bool) -> Iterator[None]:
    """With gradients if `learns`, and without the hooks by which checkpointing drops what a backward needs:
    it would count what the decision saves, and not find it when it runs the layers again."""
    with (
        torch.set_grad_enabled(learns),
        torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach(), lambda saved: saved),
    ):
        yield
