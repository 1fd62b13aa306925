"""The interface of an adapter method: parameters, initial values, forward, merged weight and PEFT names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.segments import Segments

Params = Mapping[str, Tensor]


class TargetMember(NamedTuple):
    """A member of a gate that adapts a layer."""

    number: int
    """Its position in `Gate.members`."""
    feedforward: bool
    """ia3: it scales the input instead of the output."""


@dataclass(frozen=True)
class Target:
    """A linear layer that adapters can attach to."""

    name: str
    in_features: int
    out_features: int
    transposed: bool
    """GPT-2's Conv1D stores weight [in, out]."""
    feedforward: bool = False
    """ia3: scale the input instead of the output."""
    block: str | None = None
    """The feed-forward block whose experts the layer belongs to; None for a layer without experts."""
    block_width: int = 0
    """Features of the input of that block."""
    members: tuple[TargetMember, ...] = ()
    """The members of a gate that adapt the layer, ascending."""
    experts: int = 0
    """Experts whose weights are in one parameter, of which this is the name; 0 for a linear layer. The
    features are those of one expert."""
    decides: bool = False
    """switch: the layer is the first of a forward, and its input decides about the experts of all layers."""


@dataclass(frozen=True)
class Site:
    """The parts of an adapted layer that a method's forward uses."""

    base: Callable[[Tensor], Tensor]
    """The frozen layer as a function, [T, in] -> [T, out], bias included."""
    weight: Callable[[], AbstractContextManager[Tensor]]
    """A context that provides its dense weight as [out, in] (a view, or dequantized)."""
    bias: Tensor | None
    """[out] or None."""
    dropout: Callable[[Tensor], Tensor]
    """The routing's dropout for these tokens [T, in]."""


class AdapterMethod(ABC):
    """One adapter method. A new method is one file with one subclass and an entry in
    `methods/__init__.py`."""

    name: str
    lr_ratio_parameters: frozenset[str] = frozenset()
    """Parameters whose learning rate is lr_ratio x lr."""
    one_rank_in_peft: bool = False
    """Whether PEFT gives all modules of its type the rank `r`, whatever its rank_pattern."""
    reads_weight: bool = False
    """Whether `forward` reads the frozen weight, and not the frozen layer's outputs alone."""
    begins_with_weight: bool = False
    """Whether `values_of_weight` has initial values."""
    merges: bool = True
    """Whether an adapter is one weight for all tokens, so that `merge` exists."""
    decides_once: bool = False
    """Whether one decision for each token holds in all layers (adapters/routed/switch.py)."""

    @abstractmethod
    def shapes(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, for one adapter on one layer."""

    def shapes_at(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, for one adapter on one layer; [experts, ...] on the weights of all
        experts."""
        shapes = self.shapes(spec, target)
        if not target.experts:
            return shapes
        return {name: (target.experts, *shape) for name, shape in shapes.items()}

    def router_shapes(
        self, spec: AdapterSpec, targets: Mapping[str, Target]
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        """Of a method with routers: module that a router reads the input of -> parameter name -> shape, for
        one adapter."""
        return {}

    def frozen_parameters(self, spec: AdapterSpec) -> frozenset[str]:
        """The parameters that are not trained."""
        return frozenset()

    def constants(self, spec: AdapterSpec, target: Target) -> dict[str, Tensor]:
        """Tensors that all adapters of a pool share on one layer, which `forward` gets beside the
        parameters: name -> tensor."""
        return {}

    @abstractmethod
    def initialise(self, params: Params, spec: AdapterSpec, generator: torch.Generator) -> None:
        """Fill the parameters of one adapter (float32, CPU) so that the layer computes what the base layer
        computes."""

    def values_of_weight(self, weight: Tensor) -> dict[str, Tensor]:
        """Initial values that depend on the frozen weight [out, in] alone: parameter name -> tensor."""
        return {}

    @abstractmethod
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
        """Outputs [T, out] for tokens x [T, in] of K adapters; params: [K, ...] each, row k for segment k,
        and `constants`, the same in each row."""

    def single(
        self, base: Callable[[Tensor], Tensor], params: Params, spec: AdapterSpec, feedforward: bool
    ) -> Callable[[Tensor], Tensor] | None:
        """`forward` of one adapter for inference, [..., in] -> [..., out], with as few operations as
        possible; None if there is no shorter way. params: views of the adapter's values, which it must not
        copy."""
        return None

    @abstractmethod
    def merge(
        self, weight: Tensor, bias: Tensor | None, params: Params, *, spec: AdapterSpec, feedforward: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias [out] of the plain layer that computes the same as the adapted layer."""

    @abstractmethod
    def peft_config(
        self, spec: AdapterSpec, target_modules: list[str], feedforward_modules: list[str]
    ) -> dict[str, object]:
        """The method's own keys of PEFT's adapter_config.json."""

    @abstractmethod
    def peft_tensors(self, params: Params, spec: AdapterSpec, feedforward: bool) -> dict[str, Tensor]:
        """Tensor name below the module (`lora_A.weight`) -> tensor, as PEFT stores them."""

    @abstractmethod
    def from_peft(self, tensors: Params, spec: AdapterSpec, feedforward: bool) -> Params:
        """The inverse of `peft_tensors`. Raises ValueError for tensors that `peft_tensors` cannot produce."""


def kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill [r, in] as nn.Linear does by default, from this generator."""
    nn.init.kaiming_uniform_(tensor, a=5**0.5, generator=generator)
