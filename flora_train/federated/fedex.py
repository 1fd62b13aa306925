"""FedEx-LoRA: factors are averaged, and what their product misses is added to the base of every client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_train.config.errors import user_error
from flora_train.federated.factor_mean import mean_of_factors
from flora_train.federated.low_rank import Factors


@dataclass(frozen=True)
class Residual:
    """What the clients must add to a weight of their base, [out, in], as it is sent."""

    tensors: tuple[Tensor, ...]
    """B [out, r] and A [r, in], whose product it is, or all its entries where these are fewer numbers."""

    @property
    def nbytes(self) -> int:
        """Bytes that are sent."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dense(self) -> Tensor:
        """[out, in], float64."""
        if len(self.tensors) == 1:
            return self.tensors[0].double()
        B, A = self.tensors
        return B.double() @ A.double()


def residual_of(factors: Factors, dtype: torch.dtype) -> Residual:
    """The shorter form of a matrix: its factors or its entries, in this dtype."""
    outputs, inputs = factors.shape
    if factors.rank * (outputs + inputs) < outputs * inputs:
        return Residual(((factors.scaling * factors.B).to(dtype), factors.A.to(dtype)))
    return Residual((factors.dense().to(dtype),))


def mean_with_residual(parts: Sequence[Factors], shares: Sequence[float]) -> tuple[Factors, Residual]:
    """The mean of the factors, and R = sum_k w_k s B_k A_k - s mean(B) mean(A), exact but for its dtype.

    With the columns of all B_k and the rows of all A_k, R = [B_1 .. B_K] C [A_1; ..; A_K], where block (i, j)
    of C is s (w_i [i = j] - w_i w_j) times the identity. Source: Singhal et al., "FedEx-LoRA: Exact
    Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", 2024.

    Args:
        parts: The clients' factors, of one rank and one scaling.
        shares: One per client.

    Returns:
        The factors, in the clients' dtype, and the residual.

    Raises:
        UserError: The clients' ranks or scalings differ.
    """
    rank, scaling = parts[0].rank, parts[0].scaling
    for part in parts:
        if (part.rank, part.scaling) != (rank, scaling):
            hint = "FedEx needs clients of one rank and alpha: use product_mean for ranks that differ"
            raise user_error("rank", part.rank, hint)
    mean = mean_of_factors(parts, shares, rank=rank, scaling=scaling)
    w = torch.tensor(shares, dtype=torch.float64)
    blocks = scaling * (torch.diag(w) - torch.outer(w, w))
    core = torch.kron(blocks, torch.eye(rank, dtype=torch.float64)).to(mean.B.device)
    B = torch.cat([part.B.double() for part in parts], dim=1) @ core
    A = torch.cat([part.A.double() for part in parts])
    return mean, residual_of(Factors(A, B), mean.A.dtype)
