"""Copies the adapters that gates choose from into the rows of their gates: PEFT adapters from folders, and
adapters of the same run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.methods import METHODS
from flora_train.adapters.peft_equivalents import PeftAdapter
from flora_train.adapters.peft_tensors import PREFIX
from flora_train.adapters.routed.gate_parts import gate_parts
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error

ModuleValues = Mapping[str, Mapping[str, Tensor]]
"""Module -> parameter, as the method of a plain adapter names it -> tensor."""


@torch.no_grad()
def copy_members(bank: AdapterBank, adapter: int, values: Mapping[str, ModuleValues]) -> None:
    """Set the members of a gate. values: member name -> its parameters on the layers that it adapts."""
    for name, own in members_of(bank, adapter).items():
        for module, views in own.items():
            for param, view in views.items():
                view.copy_(values[name][module][param])


def members_of(bank: AdapterBank, adapter: int) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Member name -> module -> parameter, as its own method names it -> view of its values in the row of a
    gate, without padding."""
    pool, _ = bank.location[adapter]
    spec = bank.specs[adapter]
    parameters = bank.parameters_of(spec.name)
    return {part.member: part.parameters(parameters) for part in gate_parts(pool, spec)}


def values_from_peft(
    bank: AdapterBank, adapter: int, member: AdapterSpec, peft_adapter: PeftAdapter, *, key: str
) -> ModuleValues:
    """The values of a PEFT adapter, for a member of a gate. Raises UserError where they do not fit."""
    _, tensors = peft_adapter
    source, values = str(member.init_from), {}
    method = METHODS[member.method]
    for module, views in members_of(bank, adapter)[member.name].items():
        prefix = f"{PREFIX}{module}."
        of_module = {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
        feedforward = any("ia3" in name and len(tensor) == 1 for name, tensor in of_module.items())
        try:
            params = method.from_peft(of_module, member.at(module), feedforward)
        except (ValueError, KeyError) as error:
            hint = f"has other tensors for {module} than when the run began: {error}"
            raise user_error(key, source, hint) from error
        for param, view in views.items():
            shape, expected = tuple(params[param].shape), tuple(view.shape)
            if shape != expected:
                hint = f"{module} has {param} of shape {shape} instead of {expected}: its files have changed"
                raise user_error(key, source, hint)
        values[module] = params
    return values


def gates_among(bank: AdapterBank, adapters: Iterable[int]) -> list[int]:
    """Those of these adapters that have a gate."""
    return [adapter for adapter in adapters if bank.specs[adapter].gate is not None]
