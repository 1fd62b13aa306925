"""The average of products: mean(B A), decomposed back to factors of one rank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flora_train.federated.low_rank import Factors, Fit, fit_rank, weighted_sum


def mean_of_products(
    parts: Sequence[Factors],
    shares: Sequence[float],
    *,
    rank: int,
    scaling: float,
    spare: Tensor | None = None,
) -> Fit:
    """The closest factors of a rank to sum_k w_k scaling_k B_k A_k.

    Exact where the mean has at most this rank, as where the clients' ranks sum to it.

    Args:
        parts: The clients' factors, of any ranks and scalings.
        shares: One per client.
        rank: Rank of the result.
        scaling: Scaling of the result.
        spare: [rank, in], see `fit_rank`.

    Returns:
        The factors in float64, and the norm of what their rank leaves out.

    Raises:
        UserError: The rank is above the number of singular values.
    """
    return fit_rank(weighted_sum(parts, shares), rank, scaling=scaling, spare=spare)
