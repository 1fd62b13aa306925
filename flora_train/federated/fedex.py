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
    """What the clients must add to a weight of their base, [out, in]."""

    factors: Factors
    """Its exact factors, of the sum of the clients' ranks, float64."""
    dtype: torch.dtype
    """That it is sent in."""

    @property
    def nbytes(self) -> int:
        """Bytes that it is sent in: its factors, or all its entries where these are fewer."""
        outputs, inputs = self.factors.shape
        numbers = min(self.factors.rank * (outputs + inputs), outputs * inputs)
        return numbers * self.dtype.itemsize

    def dense(self) -> Tensor:
        """[out, in], float64."""
        return self.factors.dense()


def mean_with_residual(parts: Sequence[Factors], shares: Sequence[float]) -> tuple[Factors, Residual]:
    """The mean of the factors, and R = sum_k w_k s B_k A_k - s mean(B) mean(A), exact.

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
    return mean, Residual(Factors(A, B), mean.A.dtype)
