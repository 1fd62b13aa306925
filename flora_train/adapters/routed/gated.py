"""Layers with a gate: base(x) + sum_e w_e delta_e(x) for each token, over the members that the gate chooses.

LoRA and IA3 members are not sorted: the tokens of an adapter meet all its members at once, as one LoRA of
rank n R whose hidden features are weighted, or as one matrix of scales, which is faster for small ranks than
sending each token to its own. fLoRA members are computed for the tokens that choose them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from flora_train.adapters.methods import METHODS, Params, Site
from flora_train.adapters.methods.meteora import DOWN, GATE, UP, MemberStack, member_stacks
from flora_train.adapters.routed.choice import Choice, choose, router_logits
from flora_train.adapters.routed.few_tokens import is_few, shares
from flora_train.adapters.routed.gate_loss import with_gate_loss
from flora_train.adapters.routed.recording import record_choice
from flora_train.adapters.routing import RouteRecorder, Routing, Span
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.autocast import no_autocast
from flora_train.kernels.expert_pairs import UNUSED, combine_pairs, gather_pairs, group_pairs
from flora_train.kernels.segments import Segments, expand_to_units, per_segment, to_units


def run_gated(
    x: Tensor,
    site: Site,
    module: str,
    *,
    span: Span,
    routing: Routing,
    recorder: RouteRecorder | None,
    tokens_per_row: int,
) -> Tensor:
    """[T, in] -> [T, out] for the tokens of the adapters of a span, on the layer `module`."""
    assert span.pool is not None
    assert span.slots is not None
    spec = span.specs[0]
    assert spec.gate is not None
    segments = span.segments.scaled(tokens_per_row)
    params = span.gather(module)
    logits = router_logits(x, params[GATE], segments)
    choice = choose(logits, spec.gate)
    record_choice(recorder, choice, module, routing=routing, span=span, tokens_per_row=tokens_per_row)
    stacks = member_stacks(spec, span.pool.targets[module])
    is_lora = [stack.kind for stack in stacks] == ["lora"]
    if is_lora and len(span.specs) == 1 and is_few(choice, routing):
        return _few_lora(x, site, params, stacks[0], choice)
    y = _GatedTokens(x, site, params, choice=choice, segments=segments).output(stacks)
    return with_gate_loss(y, logits, module, routing, span, tokens_per_row=tokens_per_row)


def _few_lora(x: Tensor, site: Site, params: Params, stack: MemberStack, choice: Choice) -> Tensor:
    """The layer for few tokens [T, in] of one adapter whose members here are LoRA adapters, without
    gradients."""
    y, experts, weights = site.base(x), choice.experts, choice.weights
    count, members = len(stack.numbers), choice.probabilities.shape[1]
    if count < members:
        experts = _places(stack.numbers, members, experts.device)[experts]
        weights, experts = weights * (experts != UNUSED), experts.clamp_min(0)
    scaled = shares(experts, count, weights.dtype, weights) * _scalings(stack, weights.dtype, y.device)
    factors = scaled.repeat_interleave(stack.rank, dim=1).to(y.dtype)
    A, B = params[DOWN["lora"]][0].to(y.dtype), params[UP["lora"]][0].to(y.dtype)
    return torch.addmm(y, torch.mm(x.to(y.dtype), A.T) * factors, B.T)


class _GatedTokens:
    """The tokens x [T, in] of K adapters on a layer, with the members that they chose."""

    def __init__(self, x: Tensor, site: Site, params: Params, *, choice: Choice, segments: Segments) -> None:
        self.x, self.site, self.params, self.choice, self.segments = x, site, params, choice, segments
        zeros = choice.weights.new_zeros(choice.probabilities.shape)
        self.weights = zeros.scatter(1, choice.experts, choice.weights)
        """[T, N]: 0 for members that a token does not choose."""

    def output(self, stacks: Sequence[MemberStack]) -> Tensor:
        """[T, out]. A member whose output replaces the base's takes its weight from that of the base, so that
        one member alone is computed as it is without a gate."""
        plain = self.site.base(self.x)
        by_kind = {stack.kind: stack for stack in stacks}
        factor: Tensor | None = None
        for kind in ("ia3_out", "flora"):
            if kind in by_kind:
                taken = self._weights_of(by_kind[kind]).sum(1, keepdim=True)
                factor = 1.0 - taken if factor is None else factor - taken
        if "ia3_out" in by_kind and factor is not None:
            factor = factor + self._scales(by_kind["ia3_out"], plain)
        y = plain
        if factor is not None:
            y = plain * factor.to(plain.dtype)
        if "ia3_in" in by_kind:
            scaled = self._scaled_input(by_kind["ia3_in"])
            y = scaled if factor is None else y + (scaled - plain)
        if "lora" in by_kind:
            y = self._add_lora(y, by_kind["lora"])
        if "flora" in by_kind:
            y = y + self._flora(by_kind["flora"])
        return y

    def _weights_of(self, stack: MemberStack) -> Tensor:
        """[T, n]."""
        first, count = stack.numbers[0], len(stack.numbers)
        if stack.numbers == tuple(range(first, first + count)):
            return self.weights[:, first : first + count]
        return self.weights.index_select(1, _indices(stack.numbers, self.weights.device))

    def _scales(self, stack: MemberStack, like: Tensor) -> Tensor:
        """[T, features]: sum_e w_e l_e."""
        with no_autocast(like):
            weights = to_units(self._weights_of(stack), self.segments)
            scales = self.params[stack.kind].to(weights.dtype)
            return torch.bmm(weights, expand_to_units(scales, self.segments)).flatten(0, 1)

    def _scaled_input(self, stack: MemberStack) -> Tensor:
        """The base of x times 1 + sum_e w_e (l_e - 1), [T, out]."""
        kept = 1.0 - self._weights_of(stack).sum(1, keepdim=True)
        factor = kept + self._scales(stack, self.x)
        return self.site.base(self.x * factor.to(self.x.dtype))

    def _add_lora(self, y: Tensor, stack: MemberStack) -> Tensor:
        """y [T, out] + sum_e w_e s_e (x A_e^T) B_e^T."""
        segments = self.segments
        scaling = per_segment([spec.scaling for spec in stack.specs], self.weights).flatten()
        factors = (self._weights_of(stack) * scaling).repeat_interleave(stack.rank, dim=1)
        x, factors = self.x.to(y.dtype), factors.to(y.dtype)
        with no_autocast(x):
            A, B = (self.params[names["lora"]].to(y.dtype) for names in (DOWN, UP))
            hidden = torch.bmm(to_units(x, segments), expand_to_units(A, segments).mT)
            hidden = hidden * to_units(factors, segments)
            units = torch.baddbmm(to_units(y.contiguous(), segments), hidden, expand_to_units(B, segments).mT)
        return units.flatten(0, 1)

    def _flora(self, stack: MemberStack) -> Tensor:
        """sum_e w_e f_e(x), [T, out], with f_e the layer of member e alone."""
        count = len(stack.numbers)
        members, chosen = self.choice.probabilities.shape[1], self.choice.experts
        chosen = _places(stack.numbers, members, chosen.device)[chosen]
        pairs = group_pairs(chosen, self.segments, count)
        params = {
            "A": self.params[DOWN["flora"]].flatten(0, 1),
            "B": self.params[UP["flora"]].flatten(0, 1),
        }
        specs: list[AdapterSpec] = [*stack.specs] * len(self.segments)
        outputs = METHODS["flora"].forward(
            gather_pairs(self.x, pairs),
            self.site,
            params,
            specs=specs,
            feedforward=False,
            segments=pairs.segments,
        )
        weights = self.choice.weights * (chosen != UNUSED)
        return combine_pairs(outputs, weights, pairs)


@lru_cache(maxsize=4096)
@torch.inference_mode(False)  # kept for training steps, too
def _scalings(stack: MemberStack, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n]: those of the members of a stack."""
    return torch.tensor([spec.scaling for spec in stack.specs], dtype=dtype, device=device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for training steps, too
def _indices(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [n]."""
    return torch.tensor(numbers, device=device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for training steps, too
def _places(numbers: tuple[int, ...], members: int, device: torch.device) -> Tensor:
    """int64 [N]: the position of each of all members in `numbers`, UNUSED for others."""
    places = torch.full((members,), UNUSED)
    places[list(numbers)] = torch.arange(len(numbers))
    return places.to(device)
