"""MixLoRA: expert adapters in every feed-forward block, and a router that sends each token to some of them.

Source: Li et al., "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts"
(arXiv 2404.15159). Experts can also be fLoRA or IA3 adapters. `adapters/routed/feedforward.py` computes the
blocks; the layers outside of them have a plain adapter of the experts' method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flora_train.adapters.methods.base import AdapterMethod, Params, Site, Target
from flora_train.adapters.methods.flora import Flora
from flora_train.adapters.methods.ia3 import Ia3
from flora_train.adapters.methods.lora import Lora
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.segments import Segments

EXPERT_METHODS: Mapping[str, AdapterMethod] = {method.name: method for method in (Lora(), Flora(), Ia3())}
ROUTER = "router"
"""Parameter of a router: [E, in]."""
ROUTER_DEVIATION = 0.02
"""Standard deviation of a router's initial values."""


def expert_method(spec: AdapterSpec) -> AdapterMethod:
    """The method of the experts of a routed adapter."""
    assert spec.experts is not None
    return EXPERT_METHODS[spec.experts.method]


def initialise_experts(
    params: Params, spec: AdapterSpec, generator: torch.Generator, *, stacked: bool
) -> None:
    """Fill the parameters of experts ([E, ...] each with `stacked`), as their method does."""
    method = expert_method(spec)
    if not stacked:
        method.initialise(params, spec, generator)
        return
    assert spec.experts is not None
    for expert in range(spec.experts.count):
        method.initialise({name: stack[expert] for name, stack in params.items()}, spec, generator)


class MixLora(AdapterMethod):
    """Parameters of a layer in a feed-forward block are stacks over the experts, [E, ...]."""

    name = "mixlora"
    lr_ratio_parameters = frozenset({"B"})
    merges = False

    def shapes(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        shapes = expert_method(spec).shapes(spec, target)
        if target.block is None:
            return shapes
        assert spec.experts is not None
        return {name: (spec.experts.count, *shape) for name, shape in shapes.items()}

    def router_shapes(
        self, spec: AdapterSpec, targets: Mapping[str, Target]
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        assert spec.experts is not None
        width: dict[str, int] = {}
        for target in targets.values():
            if target.block is not None:
                width.setdefault(target.block, target.block_width)
        return {block: {ROUTER: (spec.experts.count, features)} for block, features in width.items()}

    def initialise(self, params: Params, spec: AdapterSpec, generator: torch.Generator) -> None:
        if ROUTER in params:
            params[ROUTER].normal_(std=ROUTER_DEVIATION, generator=generator)
            return
        plain = {"A": 2, "B": 2, "l": 1}
        stacked = any(tensor.dim() > plain[name] for name, tensor in params.items())
        initialise_experts(params, spec, generator, stacked=stacked)

    def forward(
        self,
        x: Tensor,
        site: Site,
        params: Params,
        *,
        specs: Sequence[AdapterSpec],
        feedforward: bool,
        segments: Segments,
    ) -> Tensor:
        """Of a layer outside the feed-forward blocks."""
        return expert_method(specs[0]).forward(
            x, site, params, specs=specs, feedforward=feedforward, segments=segments
        )

    def single(
        self, base: Callable[[Tensor], Tensor], params: Params, spec: AdapterSpec, feedforward: bool
    ) -> Callable[[Tensor], Tensor] | None:
        """Of a layer outside the feed-forward blocks."""
        return expert_method(spec).single(base, params, spec, feedforward)

    def merge(
        self, weight: Tensor, bias: Tensor | None, params: Params, *, spec: AdapterSpec, feedforward: bool
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError("the experts that a token is sent to are known only when it is computed")

    def peft_config(
        self, spec: AdapterSpec, target_modules: list[str], feedforward_modules: list[str]
    ) -> dict[str, object]:
        """That of the adapters outside the feed-forward blocks, and of one expert."""
        return expert_method(spec).peft_config(spec, target_modules, feedforward_modules)

    def peft_tensors(self, params: Params, spec: AdapterSpec, feedforward: bool) -> dict[str, Tensor]:
        return expert_method(spec).peft_tensors(params, spec, feedforward)

    def from_peft(self, tensors: Params, spec: AdapterSpec, feedforward: bool) -> Params:
        return expert_method(spec).from_peft(tensors, spec, feedforward)
