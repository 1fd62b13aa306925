"""LoRA: W0 + scaling * B A."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flora_train.adapters.methods.base import AdapterMethod, Params, Site, Target, kaiming_uniform
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.lora.op import lora_add
from flora_train.kernels.segments import Segments


class Lora(AdapterMethod):
    name = "lora"
    lr_ratio_parameters = frozenset({"B"})

    def shapes(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        return {"A": (spec.rank, target.in_features), "B": (target.out_features, spec.rank)}

    def initialise(self, params: Params, spec: AdapterSpec, generator: torch.Generator) -> None:
        kaiming_uniform(params["A"], generator)
        params["B"].zero_()

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
        scaling = [spec.scaling for spec in specs]
        return lora_add(
            site.base(x), site.dropout(x), params["A"], params["B"], scaling=scaling, segments=segments
        )

    def single(
        self, base: Callable[[Tensor], Tensor], params: Params, spec: AdapterSpec, feedforward: bool
    ) -> Callable[[Tensor], Tensor]:
        A, B, scaling = params["A"], params["B"].T, spec.scaling

        def apply(x: Tensor) -> Tensor:
            y = base(x)
            own = x.view(-1, x.shape[-1]).to(y.dtype)
            hidden = torch.mm(own, A.T.to(y.dtype))
            added = torch.addmm(y.view(-1, y.shape[-1]), hidden, B.to(y.dtype), alpha=scaling)
            return added.view(y.shape)

        return apply

    def merge(
        self, weight: Tensor, bias: Tensor | None, params: Params, *, spec: AdapterSpec, feedforward: bool
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = spec.scaling * (params["B"].to(wide) @ params["A"].to(wide))
        return (weight.to(wide) + delta).to(weight.dtype), bias

    def peft_config(
        self, spec: AdapterSpec, target_modules: list[str], feedforward_modules: list[str]
    ) -> dict[str, object]:
        return lora_config(spec, target_modules)

    def peft_tensors(self, params: Params, spec: AdapterSpec, feedforward: bool) -> dict[str, Tensor]:
        return {"lora_A.weight": params["A"], "lora_B.weight": params["B"]}

    def from_peft(self, tensors: Params, spec: AdapterSpec, feedforward: bool) -> Params:
        return {"A": tensors["lora_A.weight"], "B": tensors["lora_B.weight"]}


def lora_config(spec: AdapterSpec, target_modules: list[str]) -> dict[str, object]:
    """The own keys of a LORA in PEFT's adapter_config.json."""
    config: dict[str, object] = {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "lora_dropout": spec.dropout,
        "bias": "none",
        "target_modules": target_modules,
    }
    if spec.rank_pattern:
        config["rank_pattern"] = dict(spec.rank_pattern)
    if spec.alpha_pattern:
        config["alpha_pattern"] = dict(spec.alpha_pattern)
    return config
