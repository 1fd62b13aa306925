"""LoRA-Switch: expert adapters in every adapted layer, and one router that sends each token to the same
experts in all of them.

Source: Kong et al., "LoRA-Switch: Boosting the Efficiency of Dynamic LLM Adapters via System-Algorithm
Co-design" (arXiv 2405.17741). The router reads the input of the first adapted layer. The output of a layer is
W0 x + sum_e w_e delta_e(x). Experts can also be fLoRA or IA3 adapters. `adapters/routed/switch.py` computes
the layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flora_train.adapters.methods.base import Params, Target
from flora_train.adapters.methods.routed import (
    ROUTER,
    ROUTER_DEVIATION,
    MethodWithExperts,
    expert_method,
    initialise_experts,
)
from flora_train.adapters.spec import AdapterSpec


class Switch(MethodWithExperts):
    """Parameters of every layer are stacks over the experts, [E, ...]; the first layer also has the
    router, [E, in]."""

    name = "switch"
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
