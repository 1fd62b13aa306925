"""IA3: a learned scale per output feature, or per input feature of feed-forward layers, as in PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flora_train.adapters.methods.base import AdapterMethod, Params, Site, Target
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.ia3.op import ia3_scale
from flora_train.kernels.segments import Segments


class Ia3(AdapterMethod):
    name = "ia3"

    def shapes(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        features = target.in_features if target.feedforward else target.out_features
        return {"l": (features,)}

    def initialise(self, params: Params, spec: AdapterSpec, generator: torch.Generator) -> None:
        params["l"].fill_(1.0)

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
        if feedforward:
            return site.base(ia3_scale(x, params["l"], segments))
        return ia3_scale(site.base(x), params["l"], segments)  # the bias is scaled too, as in PEFT

    def single(
        self, base: Callable[[Tensor], Tensor], params: Params, spec: AdapterSpec, feedforward: bool
    ) -> Callable[[Tensor], Tensor]:
        scale = params["l"]
        if feedforward:
            return lambda x: base(x * scale.to(x.dtype))

        def apply(x: Tensor) -> Tensor:
            y = base(x)
            return y * scale.to(y.dtype)

        return apply

    def merge(
        self, weight: Tensor, bias: Tensor | None, params: Params, *, spec: AdapterSpec, feedforward: bool
    ) -> tuple[Tensor, Tensor | None]:
        scale = params["l"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        if feedforward:
            return (weight.to(wide) * scale).to(weight.dtype), bias
        if bias is not None:
            bias = (bias.to(wide) * scale).to(bias.dtype)
        return (weight.to(wide) * scale[:, None]).to(weight.dtype), bias

    def peft_config(
        self, spec: AdapterSpec, target_modules: list[str], feedforward_modules: list[str]
    ) -> dict[str, object]:
        return {
            "peft_type": "IA3",
            "target_modules": target_modules,
            "feedforward_modules": feedforward_modules,
        }

    def peft_tensors(self, params: Params, spec: AdapterSpec, feedforward: bool) -> dict[str, Tensor]:
        scale = params["l"]
        return {"ia3_l": scale[None] if feedforward else scale[:, None]}

    def from_peft(self, tensors: Params, spec: AdapterSpec, feedforward: bool) -> Params:
        return {"l": tensors["ia3_l"].flatten()}
