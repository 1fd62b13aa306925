"""FedAvg of the factors of LoRA and fLoRA: the usual way, and the baseline.

mean(B) mean(A) is not mean(B A), unless all clients have one A or one B: what is averaged is not what the
clients compute. `interference` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence

from flora_train.federated.low_rank import Factors, weighted_sum
from flora_train.federated.ranks import padded
from flora_train.federated.weights import weighted_mean


def mean_of_factors(
    parts: Sequence[Factors], shares: Sequence[float], *, rank: int, scaling: float
) -> Factors:
    """(sum_k w_k B_k) and (sum_k w_k A_k).

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017, applied to factors as in FedIT (Zhang et al. 2023).

    Args:
        parts: The clients' factors. Those of a lower rank are padded with zeros, as in HetLoRA (Cho et al.
            2024); a scaling of another size is put into B.
        shares: One per client.
        rank: Rank of the result.
        scaling: Scaling of the result.

    Returns:
        The factors, in the clients' dtype.
    """
    same = [padded(part, rank, scaling) for part in parts]
    A = weighted_mean([part.A for part in same], shares)
    B = weighted_mean([part.B for part in same], shares)
    return Factors(A, B, scaling)


def interference(parts: Sequence[Factors], shares: Sequence[float], mean: Factors) -> float:
    """Frobenius norm of (mean of the products) - (product of the means)."""
    exact = weighted_sum(parts, shares).dense()
    return float((exact - mean.dense()).norm())
