"""The average of fLoRA's modulations: mean(1 + B A), or mean(B A) of the pure variant, and its factors.

W0 * M is linear in M, so that the mean of the modulations is the mean of what the clients compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.federated.low_rank import Factors, Fit, fit_rank, weighted_sum


def mean_of_modulations(
    parts: Sequence[Factors],
    offsets: Sequence[float],
    shares: Sequence[float],
    *,
    rank: int,
    offset: float,
    spare: Tensor | None = None,
) -> Fit:
    """The closest B A of a rank to sum_k w_k (offset_k + B_k A_k) - offset.

    The fit weighs all entries of M alike, whatever those of W0.

    Args:
        parts: The clients' factors, of any ranks.
        offsets: Of each client, 1 for the residual variant and 0 for the pure one.
        shares: One per client.
        rank: Rank of the result.
        offset: Of the result.
        spare: [rank, in], see `fit_rank`.

    Returns:
        The factors in float64, and the norm of what their rank leaves out.

    Raises:
        UserError: The rank is above the number of singular values.
    """
    constant = sum(o * w for o, w in zip(offsets, shares, strict=True)) - offset
    matrices, weights = list(parts), list(shares)
    if abs(constant) > 1e-9:  # clients of both variants: the rest is a matrix of one number, which has rank 1
        outputs, inputs = parts[0].shape
        ones = torch.ones(max(outputs, inputs), dtype=torch.float64, device=parts[0].A.device)
        matrices.append(Factors(ones[None, :inputs], ones[:outputs, None]))
        weights.append(constant)
    return fit_rank(weighted_sum(matrices, weights), rank, scaling=1.0, spare=spare)
