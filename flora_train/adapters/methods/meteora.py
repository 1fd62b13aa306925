"""MeteoRA: on every adapted layer, a gate that chooses, for each token, among adapters that exist already.

Source: Xu et al., "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models" (arXiv 2405.13053). The
members can be LoRA, fLoRA and IA3 adapters, also in one gate. `adapters/routed/gated.py` computes the layers.

A gate has an output for each of the N members on every layer that some member adapts. Of n members of one
method on a layer, the parameters are stacks, whose ranks are padded with zeros to the largest one, R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flora_train.adapters.methods.base import Params, Target
from flora_train.adapters.methods.routed import ROUTER_DEVIATION, RoutedMethod
from flora_train.adapters.methods.without_peft import WithoutPeftType
from flora_train.adapters.spec import AdapterSpec

GATE = "gate"
"""Parameter of the gate: [N, in]."""
MemberKind = Literal["lora", "flora", "ia3_out", "ia3_in"]
"""Members whose parameters make one stack: IA3 that scales outputs, or inputs, are two kinds."""
DOWN = {"lora": "lora_A", "flora": "flora_A"}
"""Kind -> its parameter [n R, in] (lora) or [n, R, in]."""
UP = {"lora": "lora_B", "flora": "flora_B"}
"""Kind -> its parameter [out, n R] (lora) or [n, out, R]."""


@dataclass(frozen=True)
class MemberStack:
    """The members of one kind on a layer."""

    kind: MemberKind
    numbers: tuple[int, ...]
    """Their positions in `Gate.members`, ascending."""
    specs: tuple[AdapterSpec, ...]
    """Each as it is on the layer."""

    @property
    def rank(self) -> int:
        """R."""
        return max(spec.rank for spec in self.specs)


def member_stacks(spec: AdapterSpec, target: Target) -> list[MemberStack]:
    """The members that adapt a layer, by kind."""
    assert spec.gate is not None
    of_kind: dict[MemberKind, list[int]] = {}
    for number, feedforward in target.members:
        of_kind.setdefault(_kind(spec.gate.members[number].method, feedforward), []).append(number)
    stacks = []
    for kind, numbers in of_kind.items():
        specs = tuple(spec.gate.members[number].at(target.name) for number in numbers)
        stacks.append(MemberStack(kind, tuple(numbers), specs))
    return stacks


def _kind(method: str, feedforward: bool) -> MemberKind:
    if method == "ia3":
        return "ia3_in" if feedforward else "ia3_out"
    assert method in ("lora", "flora")
    return "lora" if method == "lora" else "flora"


def member_views(params: Params, spec: AdapterSpec, target: Target, number: int) -> dict[str, Tensor] | None:
    """The parameters of one member on a layer, without padding, as its own method names and shapes them:
    views of those of the layer. None for a member that does not adapt the layer."""
    for stack in member_stacks(spec, target):
        if number not in stack.numbers:
            continue
        place = stack.numbers.index(number)
        rank = stack.specs[place].rank
        if stack.kind == "lora":
            start = place * stack.rank
            part = slice(start, start + rank)
            return {"A": params[DOWN["lora"]][part], "B": params[UP["lora"]][:, part]}
        if stack.kind == "flora":
            return {"A": params[DOWN["flora"]][place, :rank], "B": params[UP["flora"]][place, :, :rank]}
        return {"l": params[stack.kind][place]}
    return None


class Meteora(RoutedMethod, WithoutPeftType):
    """Members begin as the identity, until their values are read (`export/gate_members.py`)."""

    name = "meteora"
    lr_ratio_parameters = frozenset(UP.values())
    no_peft_type = "PEFT has no type for a gate over adapters: each of its members is an adapter of PEFT"

    def shapes(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        assert spec.gate is not None
        inputs, outputs = target.in_features, target.out_features
        shapes: dict[str, tuple[int, ...]] = {GATE: (len(spec.gate.members), inputs)}
        for stack in member_stacks(spec, target):
            count = len(stack.numbers)
            if stack.kind == "lora":
                shapes |= {"lora_A": (count * stack.rank, inputs), "lora_B": (outputs, count * stack.rank)}
            elif stack.kind == "flora":
                shapes |= {"flora_A": (count, stack.rank, inputs), "flora_B": (count, outputs, stack.rank)}
            else:
                shapes[stack.kind] = (count, inputs if stack.kind == "ia3_in" else outputs)
        return shapes

    def frozen_parameters(self, spec: AdapterSpec) -> frozenset[str]:
        assert spec.gate is not None
        if spec.gate.train_members:
            return frozenset()
        return frozenset((*DOWN.values(), *UP.values(), "ia3_in", "ia3_out"))

    def initialise(self, params: Params, spec: AdapterSpec, generator: torch.Generator) -> None:
        for name, tensor in params.items():
            if name == GATE:
                tensor.normal_(std=ROUTER_DEVIATION, generator=generator)
            else:
                tensor.fill_(float(name.startswith("ia3")))
