"""What routed methods share: no layer of theirs is one weight, and some have experts of a plain method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flora_train.adapters.methods.base import AdapterMethod, Params, Site
from flora_train.adapters.methods.flora import Flora
from flora_train.adapters.methods.ia3 import Ia3
from flora_train.adapters.methods.lora import Lora
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.segments import Segments

EXPERT_METHODS: Mapping[str, AdapterMethod] = {method.name: method for method in (Lora(), Flora(), Ia3())}
ROUTER = "router"
"""Parameter of a router: [E, in]."""
ROUTER_DEVIATION = 0.02
"""Standard deviation of the initial values of routers and gates."""


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


class RoutedMethod(AdapterMethod):
    """A method whose layers are computed by `adapters/routed`, which knows the parts of each token."""

    merges = False

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
        raise NotImplementedError("a layer needs the choices of its router: adapters/routed computes it")

    def merge(
        self, weight: Tensor, bias: Tensor | None, params: Params, *, spec: AdapterSpec, feedforward: bool
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError("the parts that a token is sent to are known only when it is computed")


class MethodWithExperts(RoutedMethod):
    """A routed method that trains its own experts, each of which is an adapter of a plain method in PEFT."""

    lr_ratio_parameters = frozenset({"B"})

    def peft_config(
        self, spec: AdapterSpec, target_modules: list[str], feedforward_modules: list[str]
    ) -> dict[str, object]:
        """That of one expert, or of the layers without experts."""
        return expert_method(spec).peft_config(spec, target_modules, feedforward_modules)

    def peft_tensors(self, params: Params, spec: AdapterSpec, feedforward: bool) -> dict[str, Tensor]:
        """Of one expert, or of the layers without experts."""
        return expert_method(spec).peft_tensors(params, spec, feedforward)

    def from_peft(self, tensors: Params, spec: AdapterSpec, feedforward: bool) -> Params:
        """Of one expert, or of the layers without experts."""
        return expert_method(spec).from_peft(tensors, spec, feedforward)
