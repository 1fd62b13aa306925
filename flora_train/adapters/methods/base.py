"""What must a method say about itself? Its parameters, start, forward, merged weight and PEFT names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.segments import Segments

Params = Mapping[str, Tensor]


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


@dataclass(frozen=True)
class Site:
    """What a method may use of the layer it runs in.

    base:   the frozen layer as a function, [T, in] -> [T, out], bias included
    weight: a context in which its dense weight stands as [out, in] (a view, or dequantised)
    bias:   [out] or None
    dropout: the routing's dropout for these tokens [T, in]
    """

    base: Callable[[Tensor], Tensor]
    weight: Callable[[], AbstractContextManager[Tensor]]
    bias: Tensor | None
    dropout: Callable[[Tensor], Tensor]


class AdapterMethod(ABC):
    """One family of adapters. A new method is one file with one subclass and a row in `methods/__init__.py`."""

    name: str

    @abstractmethod
    def shapes(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape for one adapter on one layer."""

    @abstractmethod
    def initialise(self, params: Params, spec: AdapterSpec, generator: torch.Generator) -> None:
        """Fill the parameters of one adapter (float32, CPU) so that the layer is the identity."""

    @abstractmethod
    def forward(
        self, x: Tensor, site: Site, params: Params, specs: Sequence[AdapterSpec], feedforward: bool, segments: Segments
    ) -> Tensor:
        """Outputs [T, out] for tokens x [T, in] of these adapters: params are stacked [K, ...], one row per segment."""

    @abstractmethod
    def merge(
        self, weight: Tensor, bias: Tensor | None, params: Params, spec: AdapterSpec, feedforward: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias [out] of the plain layer that equals the adapted one."""

    @abstractmethod
    def peft_config(self, spec: AdapterSpec, target_modules: list[str], feedforward_modules: list[str]) -> dict[str, object]:
        """The method's own fields of PEFT's adapter_config.json."""

    @abstractmethod
    def peft_tensors(self, params: Params, spec: AdapterSpec, feedforward: bool) -> dict[str, Tensor]:
        """Suffix below the module (`lora_A.weight`) -> tensor, as PEFT stores them."""

    @abstractmethod
    def from_peft(self, tensors: Params, spec: AdapterSpec, feedforward: bool) -> Params:
        """What `peft_tensors` made these of. Raises ValueError, saying what it needs, for what it never makes."""


def kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """nn.Linear's default start for [r, in] factors, from our own generator."""
    nn.init.kaiming_uniform_(tensor, a=5**0.5, generator=generator)
