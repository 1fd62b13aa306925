"""The weight of one served layer with one adapter merged into it, beside the base model's weight.

The base model's weight is never changed: rows of other adapters and of the base model go through it as
before, and unmerging is to drop the merged one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from flora_train.kernels.flora.reference import modulated_weight
from flora_train.serving.layer_plan import SlotUse


@dataclass(frozen=True)
class MergedRows:
    """The tokens of a batch that use merged weights."""

    positions: Tensor | None
    """LongTensor [n], in the order of the batch; None: all tokens."""


@dataclass(frozen=True)
class MergedWeight:
    """A layer with an adapter merged into it, or this process's part of it."""

    weight: Tensor
    """[outputs, inputs]."""
    bias_scale: Tensor | None = None
    """[outputs]: what an IA3 of outputs multiplies the bias by."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Outputs [T, outputs] of x [T, inputs]."""
        if bias is not None and self.bias_scale is not None:
            bias = bias * self.bias_scale
        return linear(x, self.weight, bias)

    @property
    def bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()


def merged_lora(weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> MergedWeight:
    """W + B A on every slice of the outputs; vLLM has multiplied B by the scale.

    A: [R, inputs] for each slice; B: [outputs of the slice, R].
    """
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    sizes = [len(slice_B) for slice_B in B]
    for part, W, slice_A, slice_B in zip(merged.split(sizes), weight.split(sizes), A, B, strict=True):
        torch.addmm(W, slice_B, slice_A, out=part)
    return MergedWeight(merged)


def merged_multipliers(
    weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], use: SlotUse
) -> MergedWeight:
    """W * M on every slice of the outputs. A: [R, inputs] for each slice; B: [R, outputs of the slice]."""
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    sizes = [slice_B.shape[1] for slice_B in B]
    scale = weight.new_ones(len(weight))
    slices = zip(merged.split(sizes), weight.split(sizes), scale.split(sizes), strict=True)
    for s, (part, W, part_scale) in enumerate(slices):
        rank = use.ranks[s]
        if rank == 0:
            part.copy_(W)
        elif use.scales[s] == "input":
            torch.mul(W, 1 + A[s][0], out=part)
        elif use.scales[s] == "output":
            part_scale += B[s][0]
            torch.mul(W, part_scale[:, None], out=part)
        else:
            offset = float(use.keep_base[s])
            part.copy_(modulated_weight(W, A[s][:rank], B[s][:rank].mT, offset=offset))
    if "output" not in use.scales:
        return MergedWeight(merged)
    return MergedWeight(merged, scale)
