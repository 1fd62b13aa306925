"""Layers of switch adapters: W0 x + sum_e w_e delta_e(x), for the experts that the first layer decided on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flora_train.adapters.methods import Params, Site, Target
from flora_train.adapters.methods.routed import ROUTER, expert_method
from flora_train.adapters.routed.decision import Decision, decide, decision_of
from flora_train.adapters.routed.few_tokens import add_experts, is_few
from flora_train.adapters.routing import BatchRouting, Routing, Span
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.expert_pairs import combine_pairs, gather_pairs
from flora_train.kernels.flora.op import flora_linear
from flora_train.kernels.ia3.op import ia3_scale
from flora_train.kernels.lora.op import lora_add

Delta = Callable[[Tensor], Tensor]


def switched_layer(
    x: Tensor,
    site: Site,
    target: Target,
    *,
    span: Span,
    routing: Routing,
    router: BatchRouting,
    tokens_per_row: int,
) -> Tensor:
    """[T, in] -> [T, out]: a layer for the tokens of the switch adapters of a span. The first layer decides
    about the experts of all layers."""
    assert span.pool is not None
    assert span.slots is not None
    if target.decides:
        decide(x, target.name, routing, span, router=router, tokens_per_row=tokens_per_row)
    decision = decision_of(routing, span, target.name, tokens_per_row)
    stacks = span.gather(target.name)
    params: Params = {name: stack.flatten(0, 1) for name, stack in stacks.items() if name != ROUTER}
    if decision.experts == 1:
        # One expert is a plain adapter, whose weight is 1 for all tokens.
        return expert_method(span.specs[0]).forward(
            x, site, params, specs=span.specs, feedforward=target.feedforward, segments=decision.segments
        )
    if is_few(decision.choice, routing) and len(span.specs) == 1 and _kind(span.specs[0], target) == "lora":
        return _few_lora(x, site, stacks, span.specs[0], decision)
    specs = [spec for spec in span.specs for _ in range(decision.experts)]
    compute = OUTPUTS[_kind(specs[0], target)]
    return compute(x, site, params, specs, decision)


def _kind(spec: AdapterSpec, target: Target) -> str:
    assert spec.experts is not None
    if spec.experts.method == "ia3" and target.feedforward:
        return "ia3 of inputs"
    return spec.experts.method


def _few_lora(
    x: Tensor, site: Site, stacks: Mapping[str, Tensor], spec: AdapterSpec, decision: Decision
) -> Tensor:
    """`_lora` for few tokens of one adapter, without gradients."""
    y, choice = site.base(x), decision.choice
    weights = choice.weights * spec.scaling
    return add_experts(y, x, stacks["A"][0], stacks["B"][0], choice.experts, weights)


def _lora(x: Tensor, site: Site, params: Params, specs: Sequence[AdapterSpec], decision: Decision) -> Tensor:
    y, pairs = site.base(x), decision.pairs
    delta = lora_add(
        y.new_zeros(pairs.count, y.shape[1]),
        gather_pairs(site.dropout(x), pairs),
        params["A"],
        params["B"],
        scaling=[spec.scaling for spec in specs],
        segments=pairs.segments,
    )
    return y + combine_pairs(delta, decision.choice.weights, pairs)


def _flora(x: Tensor, site: Site, params: Params, specs: Sequence[AdapterSpec], decision: Decision) -> Tensor:
    y, pairs = site.base(x), decision.pairs
    with site.weight() as weight:
        delta = flora_linear(
            gather_pairs(x, pairs),
            weight,
            params["A"],
            params["B"],
            offset=[0.0] * len(specs),
            segments=pairs.segments,
        )
    return y + combine_pairs(delta, decision.choice.weights, pairs)


def _ia3(x: Tensor, site: Site, params: Params, specs: Sequence[AdapterSpec], decision: Decision) -> Tensor:
    return _scaled(site.base(x), params["l"], decision)


def _ia3_of_inputs(
    x: Tensor, site: Site, params: Params, specs: Sequence[AdapterSpec], decision: Decision
) -> Tensor:
    return site.base(_scaled(x, params["l"], decision))


def _scaled(x: Tensor, scale: Tensor, decision: Decision) -> Tensor:
    """x + sum_e w_e (l_e - 1) x."""
    pairs = decision.pairs
    delta = ia3_scale(gather_pairs(x, pairs), scale - 1.0, pairs.segments)
    return x + combine_pairs(delta, decision.choice.weights, pairs)


OUTPUTS = {"lora": _lora, "flora": _flora, "ia3": _ia3, "ia3 of inputs": _ia3_of_inputs}
"""Kind of expert -> what computes a layer."""


@torch.no_grad()
def joined_experts(
    params: Params, experts: Sequence[int], weights: Sequence[float], spec: AdapterSpec
) -> dict[str, Tensor]:
    """The parameters of the plain adapter that these experts of a layer are together, from stacks
    [E, ...]: those of one expert of weight 1 are views.

    Of lora and flora, ranks are put side by side; of ia3, the scale is 1 + sum_e w_e (l_e - 1).
    """
    assert spec.experts is not None
    if len(experts) == 1:
        return {name: stack[experts[0]] for name, stack in params.items() if name != ROUTER}
    if spec.experts.method == "ia3":
        chosen = params["l"][list(experts)]
        return {"l": 1.0 + (chosen.new_tensor(weights)[:, None] * (chosen - 1.0)).sum(0)}
    A = torch.cat([params["A"][expert] for expert in experts])
    B = torch.cat([params["B"][e] * weight for e, weight in zip(experts, weights, strict=True)], dim=1)
    return {"A": A, "B": B}
