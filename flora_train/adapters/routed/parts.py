"""The parts of a routed adapter, each of which is a plain adapter: its experts, and its layers without
experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from flora_train.adapters.methods import METHODS, Target
from flora_train.adapters.methods.meteora import GATE
from flora_train.adapters.methods.routed import ROUTER
from flora_train.adapters.pool import Pool
from flora_train.adapters.routed.expert_names import SHARED, expert_name
from flora_train.adapters.routed.gate_parts import GatePart, gate_parts
from flora_train.adapters.spec import AdapterSpec

Parameters = Mapping[str, Mapping[str, Tensor]]
"""Module -> parameter -> tensor."""


@dataclass(frozen=True)
class Part:
    """A plain adapter within a routed one."""

    name: str
    """`expert_0` and so on, or SHARED."""
    spec: AdapterSpec
    """Of the plain method, without head."""
    targets: Mapping[str, Target]
    expert: int | None = None
    """Its position in the stacks of the routed adapter; None for SHARED."""

    def parameters(self, of_adapter: Parameters) -> dict[str, dict[str, Tensor]]:
        """The views of this part in the parameters of the routed adapter."""
        method = METHODS[self.spec.method]
        views: dict[str, dict[str, Tensor]] = {}
        for module, target in self.targets.items():
            views[module] = {}
            for param in method.shapes(self.spec.at(module), target):
                tensor = of_adapter[module][param]
                views[module][param] = tensor if self.expert is None else tensor[self.expert]
        return views


def plain_spec(spec: AdapterSpec) -> AdapterSpec:
    """An expert of a routed adapter as an adapter of its own, without head."""
    assert spec.experts is not None
    return replace(spec, method=spec.experts.method, experts=None, head=None, labels=None)


def parts_of(pool: Pool, spec: AdapterSpec) -> Sequence[Part | GatePart]:
    """The plain adapters that a routed one is made of: its experts and its layers without experts, or the
    members of its gate."""
    return expert_parts(pool, spec) if spec.gate is None else gate_parts(pool, spec)


def expert_parts(pool: Pool, spec: AdapterSpec) -> list[Part]:
    """The experts of a routed adapter, in order, and the layers without experts, if there are some.

    A layer has experts where its parameters are stacks over them.
    """
    assert spec.experts is not None
    plain, count = plain_spec(spec), spec.experts.count
    with_experts: dict[str, Target] = {}
    without: dict[str, Target] = {}
    for module, target in pool.targets.items():
        shapes = METHODS[plain.method].shapes(plain.at(module), target)
        is_stacked = all(pool.layout[module][param][1] == (count, *shape) for param, shape in shapes.items())
        (with_experts if is_stacked else without)[module] = target
    parts = [Part(expert_name(expert), plain, with_experts, expert) for expert in range(count)]
    if without:
        parts.append(Part(SHARED, plain, without))
    return parts


def distinct_parts(parts: Sequence[Part | GatePart]) -> list[Part | GatePart]:
    """One part of each kind: the experts have the same layers and shapes, and members of a gate need not."""
    return [part for part in parts if isinstance(part, GatePart) or part.expert in (None, 0)]


def routers_of(parameters: Parameters) -> dict[str, Tensor]:
    """Module -> its router or gate [E, in], a view."""
    routers: dict[str, Tensor] = {}
    for module, params in parameters.items():
        for name in ROUTER, GATE:
            if name in params:
                routers[module] = params[name]
    return routers
