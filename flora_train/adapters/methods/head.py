"""A head alone: no layer of the base is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.adapters.methods.base import AdapterMethod, Params, Site, Target
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.segments import Segments


class HeadOnly(AdapterMethod):
    """Has no targets, so that only `peft_config` is ever called."""

    name = "head"

    def shapes(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        return {}

    def initialise(self, params: Params, spec: AdapterSpec, generator: torch.Generator) -> None:
        pass

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
        return site.base(x)

    def merge(
        self, weight: Tensor, bias: Tensor | None, params: Params, *, spec: AdapterSpec, feedforward: bool
    ) -> tuple[Tensor, Tensor | None]:
        return weight, bias

    def peft_config(
        self, spec: AdapterSpec, target_modules: list[str], feedforward_modules: list[str]
    ) -> dict[str, object]:
        """A LORA without layers: `target_modules` is PEFT's name for none."""
        from peft.utils.constants import DUMMY_TARGET_MODULES

        return {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": DUMMY_TARGET_MODULES}

    def peft_tensors(self, params: Params, spec: AdapterSpec, feedforward: bool) -> dict[str, Tensor]:
        return {}

    def from_peft(self, tensors: Params, spec: AdapterSpec, feedforward: bool) -> Params:
        return {}
