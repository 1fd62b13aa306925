"""DoRA: m / |W0 + scaling * B A| * (W0 + scaling * B A), row by row, as in PEFT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.adapters.methods.base import AdapterMethod, Params, Site, Target, kaiming_uniform
from flora_train.adapters.methods.lora import lora_config
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.dora.op import adapted_norms, dora_add
from flora_train.kernels.segments import Segments


class Dora(AdapterMethod):
    name = "dora"
    lr_ratio_parameters = frozenset({"B", "m"})  # of m, too, as in PEFT's create_loraplus_optimizer
    begins_with_weight = True

    def shapes(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        rank, outputs = spec.rank, target.out_features
        return {"A": (rank, target.in_features), "B": (outputs, rank), "m": (outputs,)}

    def initialise(self, params: Params, spec: AdapterSpec, generator: torch.Generator) -> None:
        """`values_of_weight` completes it."""
        kaiming_uniform(params["A"], generator)
        params["B"].zero_()
        params["m"].fill_(1.0)

    def values_of_weight(self, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        wide = torch.promote_types(weight.dtype, torch.float32)
        none = weight.new_zeros(1, rows, 1, dtype=wide)
        return {"m": adapted_norms(weight, weight.new_zeros(1, 1, columns, dtype=wide), none, [1.0])[0]}

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
        A, B, scaling = params["A"], params["B"], [spec.scaling for spec in specs]
        with site.weight() as weight:
            norms = adapted_norms(weight, A, B, scaling)
        y, dropped = site.base(x), site.dropout(x)
        with_weight = y if dropped is x else site.base(dropped)
        rest: Tensor | None = None
        if site.bias is not None:
            rest = site.bias.to(y.dtype)
            with_weight = with_weight - rest
        if dropped is not x:
            # As in PEFT, the undropped input goes through W0 alone, and the dropped one through the change.
            rest = y - with_weight
        adapted = dora_add(
            with_weight, dropped, A, B, params["m"], norms=norms, scaling=scaling, segments=segments
        )
        return adapted if rest is None else adapted + rest

    def merge(
        self, weight: Tensor, bias: Tensor | None, params: Params, *, spec: AdapterSpec, feedforward: bool
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(weight.dtype, torch.float32)
        adapted = weight.to(wide) + spec.scaling * (params["B"].to(wide) @ params["A"].to(wide))
        factor = params["m"].to(wide) / torch.linalg.vector_norm(adapted, dim=1)
        return (factor[:, None] * adapted).to(weight.dtype), bias

    def peft_config(
        self, spec: AdapterSpec, target_modules: list[str], feedforward_modules: list[str]
    ) -> dict[str, object]:
        return {**lora_config(spec, target_modules), "use_dora": True}

    def peft_tensors(self, params: Params, spec: AdapterSpec, feedforward: bool) -> dict[str, Tensor]:
        return {
            "lora_A.weight": params["A"],
            "lora_B.weight": params["B"],
            "lora_magnitude_vector": params["m"],
        }

    def from_peft(self, tensors: Params, spec: AdapterSpec, feedforward: bool) -> Params:
        return {
            "A": tensors["lora_A.weight"],
            "B": tensors["lora_B.weight"],
            "m": tensors["lora_magnitude_vector"],
        }
