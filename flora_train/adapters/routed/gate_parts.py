"""The members of a gate as the plain adapters that they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from flora_train.adapters.methods import Target
from flora_train.adapters.methods.meteora import member_views
from flora_train.adapters.pool import Pool
from flora_train.adapters.routed.expert_names import expert_name
from flora_train.adapters.spec import AdapterSpec


@dataclass(frozen=True)
class GatePart:
    """A member of a gate."""

    name: str
    """`expert_0` and so on, as those of other routed adapters."""
    member: str
    """Its own name."""
    spec: AdapterSpec
    """Of its own method."""
    targets: Mapping[str, Target]
    """The layers that it adapts."""
    number: int
    """Its position in `Gate.members`."""
    gate: AdapterSpec
    gated: Mapping[str, Target]
    """All layers of the gate."""

    def parameters(self, of_adapter: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Module -> parameter, as its own method names it -> view in the parameters of the gate, without
        padding."""
        views: dict[str, dict[str, Tensor]] = {}
        for module in self.targets:
            own = member_views(of_adapter[module], self.gate, self.gated[module], self.number)
            assert own is not None
            views[module] = own
        return views


def gate_parts(pool: Pool, spec: AdapterSpec) -> list[GatePart]:
    """The members of a gate, in their order."""
    assert spec.gate is not None
    parts = []
    for number, member in enumerate(spec.gate.members):
        targets: dict[str, Target] = {}
        for module, target in pool.targets.items():
            feedforward = dict(target.members).get(number)
            if feedforward is not None:
                targets[module] = replace(target, feedforward=feedforward, members=())
        plain = replace(member, init_from=None)
        parts.append(GatePart(expert_name(number), member.name, plain, targets, number, spec, pool.targets))
    return parts
