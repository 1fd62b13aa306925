"""What a multiplicative adapter (fLoRA, IA3) does to the linear layers of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from flora_train.kernels.flora.materialised import near_one


@dataclass(frozen=True)
class Multiplier:
    """One layer of an adapter: y = keep_base * W x + sum over k of B[:, k] * (W (A[k] * x)) + bias.

    A fLoRA of rank r is W0 * (B A), plus W0 itself where keep_base is true. An IA3 has rank 1: it scales by
    its deviation from 1.
    """

    A: Tensor
    """[rank, inputs], float32. [1, 1] where the same number holds for all inputs: an IA3 of outputs."""
    B: Tensor
    """[outputs, rank], float32. [1, 1] where the same number holds for all outputs: an IA3 of inputs."""
    keep_base: bool = True
    """Whether the base model's own product is added: false for a pure fLoRA."""
    scales_output: bool = False
    """Whether this is an IA3 of outputs: A is 1, and the layer's bias is scaled too."""

    scales_input: bool = False
    """Whether this is an IA3 of inputs: B is 1."""

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scales(self) -> str:
        """'input', 'output' or, for a fLoRA, ''."""
        if self.scales_input:
            return "input"
        return "output" if self.scales_output else ""

    @property
    def is_near_one(self) -> bool:
        """Whether this is a fLoRA whose M is near 1 (see `near_one`)."""
        if self.scales:
            return False
        return bool(near_one(self.A[None], self.B[None], self.A.new_tensor([float(self.keep_base)])))

    def expanded(self, inputs: int, outputs: int) -> Multiplier:
        """The same with A [rank, inputs] and B [outputs, rank]."""
        A, B = self.A.expand(self.rank, inputs), self.B.expand(outputs, self.rank)
        return replace(self, A=A.contiguous(), B=B.contiguous())


@dataclass(frozen=True)
class MultiplicativeAdapter:
    """A fLoRA or an IA3, read from its folder."""

    method: Literal["flora", "ia3"]
    multipliers: Mapping[str, Multiplier]
    """Name of a linear layer, as transformers names it -> what the adapter does there."""

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(multiplier.rank for multiplier in self.multipliers.values())
