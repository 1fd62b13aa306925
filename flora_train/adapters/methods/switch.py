"""LoRA-Switch: expert adapters in every adapted layer, and one router that sends each token to the same
experts in all of them.

Source: Kong et al., "LoRA-Switch: Boosting the Efficiency of Dynamic LLM Adapters via System-Algorithm
Co-design" (arXiv 2405.17741). The router reads the input of the first adapted layer. The output of a layer is
W0 x + sum_e w_e delta_e(x). Experts can also be fLoRA or IA3 adapters. `adapters/routed/switch.py` computes
the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flora_train.adapters.methods.base import AdapterMethod, Params, Site, Target
from flora_train.adapters.methods.mixlora import (
    ROUTER,
    ROUTER_DEVIATION,
    expert_method,
    initialise_experts,
)
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.segments import Segments


class Switch(AdapterMethod):
    """Parameters of every layer are stacks over the experts, [E, ...]; the first layer also has the
    router, [E, in]."""

    name = "switch"
    lr_ratio_parameters = frozenset({"B"})
    merges = False
    decides_once = True

    def shapes(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        assert spec.experts is not None
        shapes = expert_method(spec).shapes(spec, target)
        return {name: (spec.experts.count, *shape) for name, shape in shapes.items()}

    def router_shapes(
        self, spec: AdapterSpec, targets: Mapping[str, Target]
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        assert spec.experts is not None
        return {
            name: {ROUTER: (spec.experts.count, target.in_features)}
            for name, target in targets.items()
            if target.decides
        }

    def initialise(self, params: Params, spec: AdapterSpec, generator: torch.Generator) -> None:
        """The experts as their method does, and then the router, so that a single expert begins as a plain
        adapter."""
        stacks = {name: stack for name, stack in params.items() if name != ROUTER}
        initialise_experts(stacks, spec, generator, stacked=True)
        if ROUTER in params:
            params[ROUTER].normal_(std=ROUTER_DEVIATION, generator=generator)

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
        raise NotImplementedError("a layer needs the decision of the router: adapters/routed/switch.py")

    def merge(
        self, weight: Tensor, bias: Tensor | None, params: Params, *, spec: AdapterSpec, feedforward: bool
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError("the experts that a token is sent to are known only when it is computed")

    def peft_config(
        self, spec: AdapterSpec, target_modules: list[str], feedforward_modules: list[str]
    ) -> dict[str, object]:
        """That of one expert."""
        return expert_method(spec).peft_config(spec, target_modules, feedforward_modules)

    def peft_tensors(self, params: Params, spec: AdapterSpec, feedforward: bool) -> dict[str, Tensor]:
        """Of one expert."""
        return expert_method(spec).peft_tensors(params, spec, feedforward)

    def from_peft(self, tensors: Params, spec: AdapterSpec, feedforward: bool) -> Params:
        """Of one expert."""
        return expert_method(spec).from_peft(tensors, spec, feedforward)
