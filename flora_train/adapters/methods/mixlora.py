"""MixLoRA: expert adapters in every feed-forward block, and a router that sends each token to some of them.

Source: Li et al., "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts"
(arXiv 2404.15159). Experts can also be fLoRA or IA3 adapters. `adapters/routed/feedforward.py` computes the
blocks; the layers outside of them have a plain adapter of the experts' method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flora_train.adapters.methods.base import Params, Site, Target
from flora_train.adapters.methods.routed import (
    ROUTER,
    ROUTER_DEVIATION,
    MethodWithExperts,
    expert_method,
    initialise_experts,
)
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.segments import Segments


class MixLora(MethodWithExperts):
    """Parameters of a layer in a feed-forward block are stacks over the experts, [E, ...]."""

    name = "mixlora"

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
