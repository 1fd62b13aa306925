"""fLoRA: W0 * M with M = B A (pure) or 1 + B A (residual)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.adapters.methods.base import AdapterMethod, Params, Site, Target, kaiming_uniform
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.flora.op import flora_linear
from flora_train.kernels.flora.reference import modulated_weight
from flora_train.kernels.segments import Segments


class Flora(AdapterMethod):
    name = "flora"
    lr_ratio_parameters = frozenset({"B"})
    reads_weight = True
    one_rank_in_peft = True  # peft 0.21 reads the rank_pattern of a HIRA, and does not use it

    def shapes(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        return {"A": (spec.rank, target.in_features), "B": (target.out_features, spec.rank)}

    def initialise(self, params: Params, spec: AdapterSpec, generator: torch.Generator) -> None:
        """Residual: B = 0. Pure: a_1 = b_1 = 1, other b_k = 0.

        Random a_k break the symmetry between ranks, which an all-ones start would never leave (docs/math.md).
        """
        A, B = params["A"], params["B"]
        B.zero_()
        if spec.offset:
            kaiming_uniform(A, generator)
        else:
            A.normal_(generator=generator)
            A[0], B[:, 0] = 1.0, 1.0

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
        with site.weight() as weight:
            y = flora_linear(
                x, weight, params["A"], params["B"], offset=[spec.offset for spec in specs], segments=segments
            )
        if site.bias is not None:
            y = y + site.bias.to(y.dtype)
        return y

    def merge(
        self, weight: Tensor, bias: Tensor | None, params: Params, *, spec: AdapterSpec, feedforward: bool
    ) -> tuple[Tensor, Tensor | None]:
        return modulated_weight(weight, params["A"], params["B"], offset=spec.offset), bias

    def peft_config(
        self, spec: AdapterSpec, target_modules: list[str], feedforward_modules: list[str]
    ) -> dict[str, object]:
        rank = spec.rank
        if not spec.offset:
            rank += 1  # for a pure adapter, see docs/math.md
        return {"peft_type": "HIRA", "r": rank, "target_modules": target_modules, "hira_dropout": 0.0}

    def peft_tensors(self, params: Params, spec: AdapterSpec, feedforward: bool) -> dict[str, Tensor]:
        return as_hira(params["A"], params["B"], spec.offset)

    def from_peft(self, tensors: Params, spec: AdapterSpec, feedforward: bool) -> Params:
        A, B = tensors["hira_A"], tensors["hira_B"]
        if spec.offset:
            return {"A": A, "B": B}
        if not ((A[-1] == 1.0).all() and (B[:, -1] == -1.0).all()):
            raise ValueError(f"is W0 * (1 + B A): start from it with variant=residual and rank={len(A)}")
        return {"A": A[:-1], "B": B[:, :-1]}


def as_hira(A: Tensor, B: Tensor, offset: float) -> dict[str, Tensor]:
    """HiRA's tensors for A [r, in] and B [out, r].

    HiRA computes W0 * (1 + B A): a pure adapter of rank r is a HiRA of rank r + 1, whose last rank subtracts
    the 1.
    """
    if not offset:
        A = torch.cat([A, A.new_ones(1, A.shape[1])])
        B = torch.cat([B, B.new_full((B.shape[0], 1), -1.0)], dim=1)
    return {"hira_A": A, "hira_B": B}
