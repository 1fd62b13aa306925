"""Sparse: W0 + dW, where dW has values at the entries of a random mask alone.

The first stage of federated SLoRA (Babakniya et al. 2023), which all clients share one mask in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.adapters.methods.base import Params, Site, Target
from flora_train.adapters.methods.without_peft import WithoutPeftType
from flora_train.adapters.sparse_mask import SparseMask
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.kernels.segments import Segments
from flora_train.kernels.sparse.op import sparse_add


class Sparse(WithoutPeftType):
    name = "sparse"
    no_peft_type = "PEFT has no type for values at a mask of any density: export the LoRA that its SVD begins"

    def shapes(self, spec: AdapterSpec, target: Target) -> dict[str, tuple[int, ...]]:
        return {"v": (mask_of(spec).count(target.out_features * target.in_features),)}

    def constants(self, spec: AdapterSpec, target: Target) -> dict[str, Tensor]:
        return {"indices": mask_of(spec).indices(target.out_features, target.in_features)}

    def initialise(self, params: Params, spec: AdapterSpec, generator: torch.Generator) -> None:
        params["v"].zero_()

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
        return sparse_add(site.base(x), x, params["v"], params["indices"][0], segments=segments)

    def merge(
        self, weight: Tensor, bias: Tensor | None, params: Params, *, spec: AdapterSpec, feedforward: bool
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(weight.dtype, torch.float32)
        indices = mask_of(spec).indices(*weight.shape).to(weight.device)
        merged = weight.to(wide).flatten()
        merged[indices] += params["v"].to(wide)
        return merged.view(weight.shape).to(weight.dtype), bias


def mask_of(spec: AdapterSpec) -> SparseMask:
    """The mask of a sparse adapter. Raises UserError if its specification has none."""
    if spec.mask is None:
        raise user_error("density", None, f"{spec.name} is sparse: give its density and the mask's seed")
    return spec.mask
