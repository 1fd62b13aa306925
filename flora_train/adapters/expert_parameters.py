"""Wrappers of fused experts, which pass every token through its expert with the adapter of its own row.

Tokens of different rows meet the same expert. Each pair of a token and an expert is computed with the
expert's weight and the parameters that the row's adapter has for this expert. The base's router, and so which
experts a token is sent to, are untouched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora_train.adapters.fused_experts import DOWN, ExpertLayout
from flora_train.adapters.methods import Params, Site, Target
from flora_train.adapters.pool import Pool
from flora_train.adapters.routing import BatchRouting, Routing, Span
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.kernels.expert_pairs import Pairs, combine_pairs, gather_pairs, group_pairs
from flora_train.kernels.grouped_matmul import grouped_linear
from flora_train.kernels.segments import Segments

PROBE_TOKENS = 5
MAX_DIFFERENCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.03}
"""Relative difference to the module's own outputs that rounding can cause, by dtype."""


@dataclass(frozen=True)
class ExpertSpan:
    """Consecutive pairs of a token and an expert whose adapters share a pool."""

    span: Span
    segments: Segments
    """E K segments of these pairs: those of expert e and adapter k are segment e K + k."""
    experts: Segments
    """E segments of these pairs: those of every expert."""


@dataclass(frozen=True)
class ExpertPlan:
    """The pairs of a forward: grouped by span, in it by expert, and of an expert by adapter."""

    pairs: Pairs
    spans: tuple[ExpertSpan, ...]


def plan_pairs(experts: Tensor, routing: Routing, spans: Sequence[Span], *, count: int) -> ExpertPlan:
    """The pairs of the tokens of a batch.

    experts: int64 [T, k], the experts of each token, for T tokens row by row; spans: of the routing; count:
    E. Waits for the device once (see `group_pairs`).
    """
    first, step = [0] * routing.rows, [1] * routing.rows
    start = 0
    for span in spans:
        adapters = _segments_of(span)
        for k, begin, end in adapters:
            for row in range(begin, end):
                first[span.start + row] = start + k
                step[span.start + row] = len(adapters)
        start += count * len(adapters)
    of_rows = torch.tensor([first, step], device=experts.device)
    if routing.inverse is not None:
        of_rows = of_rows.index_select(1, routing.inverse)
    of_tokens = of_rows.repeat_interleave(len(experts) // routing.rows, dim=1)[:, :, None]
    groups = of_tokens[0] + experts * of_tokens[1]
    pairs = group_pairs(groups, Segments((0, len(experts))), start)
    return ExpertPlan(pairs, tuple(_expert_spans(pairs.segments.bounds, spans, count)))


def _expert_spans(bounds: Sequence[int], spans: Sequence[Span], count: int) -> list[ExpertSpan]:
    """bounds: of the pairs of all groups."""
    found: list[ExpertSpan] = []
    first = 0
    for span in spans:
        adapters = len(_segments_of(span))
        last = first + count * adapters
        own = tuple(bound - bounds[first] for bound in bounds[first : last + 1])
        found.append(ExpertSpan(span, Segments(own), Segments(own[::adapters])))
        first = last
    return found


def _segments_of(span: Span) -> Segments:
    """The rows of each adapter of a span; those of the base model are one segment."""
    return Segments((0, span.end - span.start)) if span.pool is None else span.segments


class ExpertWeight(nn.Module):
    """One parameter of fused experts, and the pools that target it. The parameter stays in `experts`, which
    is not a part of this module."""

    def __init__(self, experts: nn.Module, layout: ExpertLayout, target: Target) -> None:
        super().__init__()
        # In a tuple, because a module would be registered as a part.
        self._experts = (experts,)
        self._part = target.name.rpartition(".")[2]
        self.layout, self.target = layout, target
        self.pools: dict[int, Pool] = {}

    @property
    def weight(self) -> Tensor:
        """The frozen weights [E, out, in], a view."""
        weight: Tensor = getattr(self._experts[0], self._part)
        return weight.mT if self.layout.is_transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """[E, out], or None."""
        if not self.layout.has_bias:
            return None
        bias: Tensor = getattr(self._experts[0], f"{self._part}_bias")
        return bias

    def forward(self, x: Tensor, plan: ExpertPlan) -> Tensor:
        """x: [P, in], the pairs of a plan. Returns [P, out]."""
        parts = x.split([span.segments.tokens for span in plan.spans])
        outputs = [self._run(span, part) for span, part in zip(plan.spans, parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run(self, span: ExpertSpan, x: Tensor) -> Tensor:
        pool, slots = span.span.pool, span.span.slots
        if pool is None or slots is None or id(pool) not in self.pools:
            return grouped_linear(x, self.weight, self.bias, span.experts)
        name = self.target.name
        # [K, E, ...] -> [E, K, ...]
        params = {param: stack.transpose(0, 1) for param, stack in pool.gather(name, slots).items()}
        specs = [spec.at(name) for spec in span.span.specs]
        if pool.method.reads_weight:
            return self._expert_by_expert(pool, x, params, specs=specs, span=span)
        site = Site(
            base=lambda tokens: grouped_linear(tokens, self.weight, self.bias, span.experts),
            weight=_no_weight,
            bias=None,
            dropout=_no_dropout,
        )
        return pool.method.forward(
            x,
            site,
            {param: stack.flatten(0, 1) for param, stack in params.items()},
            specs=specs * self.layout.experts,
            feedforward=pool.targets[name].feedforward,
            segments=span.segments,
        )

    def _expert_by_expert(
        self, pool: Pool, x: Tensor, params: Params, *, specs: list[AdapterSpec], span: ExpertSpan
    ) -> Tensor:
        """Each expert as a linear layer whose tokens are grouped by adapter."""
        adapters = len(specs)
        weight, bias = self.weight, self.bias
        # Unbound once: the backward of a slice for each expert would fill all parameters with zeros as often.
        by_expert = {param: stack.unbind(0) for param, stack in params.items()}
        parts = x.split(span.experts.lengths)
        outputs: list[Tensor] = []
        for e, start, _ in span.experts:
            own = span.segments.bounds[e * adapters : (e + 1) * adapters + 1]
            site = _site_of(weight[e], None if bias is None else bias[e])
            y = pool.method.forward(
                parts[e],
                site,
                {param: stacks[e] for param, stacks in by_expert.items()},
                specs=specs,
                feedforward=pool.targets[self.target.name].feedforward,
                segments=Segments(tuple(bound - start for bound in own)),
            )
            outputs.append(y)
        return torch.cat(outputs)


def _site_of(weight: Tensor, bias: Tensor | None) -> Site:
    """One expert's weight [out, in] and bias [out] as a layer."""
    return Site(
        base=lambda tokens: F.linear(tokens, weight, bias),
        weight=lambda: nullcontext(weight),
        bias=bias,
        dropout=_no_dropout,
    )


def _no_dropout(tokens: Tensor) -> Tensor:
    """The configuration refuses dropout beside target_parameters."""
    return tokens


def _no_weight() -> AbstractContextManager[Tensor]:
    raise AssertionError("a method that reads the weight runs expert by expert")


class AdapterExperts(nn.Module):
    """`base_layer` (frozen fused experts) and the pools that target its parameters. Without a routing it
    computes what the base layer computes.

    The wrapper of each targeted parameter is a part of this module, by the parameter's name.
    """

    def __init__(self, base_layer: nn.Module, layout: ExpertLayout, router: BatchRouting, name: str) -> None:
        super().__init__()
        self.base_layer, self.layout = base_layer, layout
        self.router = router
        self._name = name
        self._pool_ids: frozenset[int] = frozenset()
        for parameter, target in layout.targets(name, base_layer).items():
            self.add_module(parameter.rpartition(".")[2], ExpertWeight(base_layer, layout, target))

    def add_pool(self, pool: Pool, target: Target) -> None:
        """Let a pool change the parameter that this target names."""
        self.part(target.name.rpartition(".")[2]).pools[id(pool)] = pool
        self._pool_ids |= {id(pool)}

    def part(self, name: str) -> ExpertWeight:
        """The wrapper of a parameter."""
        part = self.get_submodule(name)
        assert isinstance(part, ExpertWeight)
        return part

    @torch.compiler.disable(reason="the routing of rows to adapters changes with every batch")
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states: [T, d], row by row, for the rows of the current routing; then the experts of each
        token, int64 [T, k], and their weights [T, k]. Returns [T, d].

        Raises RuntimeError if hidden_states does not hold the routed rows.
        """
        routing = self.router.routing
        if routing is None:
            return self._base(hidden_states, args, kwargs)
        spans = routing.spans_for(self._pool_ids)
        if len(spans) == 1 and spans[0].pool is None:
            return self._base(hidden_states, args, kwargs)
        if len(hidden_states) % routing.rows:
            raise RuntimeError(
                f"{self._name} got {len(hidden_states)} tokens, which are not the tokens of {routing.rows} "
                "routed rows; call bank.route with one adapter per row of this batch"
            )
        experts, weights = [*args, *kwargs.values()]
        plan = plan_pairs(experts, routing, spans, count=self.layout.experts)
        return self.run(hidden_states, weights, plan)

    def _base(self, hidden_states: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        y: Tensor = self.base_layer(hidden_states, *args, **kwargs)
        return y

    def run(self, hidden_states: Tensor, weights: Tensor, plan: ExpertPlan) -> Tensor:
        """The experts' outputs [T, d] for tokens [T, d] with weights [T, k]."""
        x = gather_pairs(hidden_states, plan.pairs)
        experts: Any = self.base_layer
        hidden = self.part(self.layout.up)(x, plan)
        hidden = experts._apply_gate(hidden) if self.layout.has_gate else experts.act_fn(hidden)
        y = self.part(DOWN)(hidden, plan)
        # The router's weights may be wider than the tokens.
        wide = torch.promote_types(y.dtype, weights.dtype)
        return combine_pairs(y.to(wide), weights, plan.pairs).to(hidden_states.dtype)

    @torch.no_grad()
    def check(self, key: str) -> None:
        """Raises UserError, naming `key`, where the base layer computes something else than its layout says:
        then neither the adapters' formulas nor a merge would be correct."""
        down = self.part(DOWN).weight
        if down.is_meta:
            return
        width, count = down.shape[1], self.layout.experts
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(PROBE_TOKENS, width, generator=generator).to(down)
        used = min(2, count)
        order = torch.stack([torch.randperm(count, generator=generator) for _ in range(PROBE_TOKENS)])
        experts = order[:, :used].to(down.device)
        weights = torch.rand(PROBE_TOKENS, used, generator=generator).to(down)
        expected = self._base(tokens, (experts, weights), {}).double()
        span = Span(None, 0, PROBE_TOKENS, Segments((0, PROBE_TOKENS)))
        plan = plan_pairs(experts, Routing(PROBE_TOKENS, (span,)), (span,), count=count)
        difference = (self.run(tokens, weights, plan).double() - expected).norm()
        if expected.isfinite().all() and difference > MAX_DIFFERENCE[down.dtype] * expected.norm() + 1e-9:
            class_name = type(self.base_layer).__name__
            hint = f"no adapter can be attached to {self._name}, a {class_name}, which does not compute "
            raise user_error(key, self._name, f"{hint}what its layout of weights says: remove it")
