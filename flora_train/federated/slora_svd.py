"""SLoRA's second stage: the singular value decomposition of dW is where LoRA begins.

B = U sqrt(S) and A = sqrt(S) V^T. Decided here, where the paper leaves it open: W0 stays as it was, and dW
enters through these factors alone. What the rank cannot hold is left out, and its norm is reported.
"""

from __future__ import annotations

from torch import Tensor

from flora_train.federated.low_rank import Fit, fit_rank


def factors_of_update(update: Tensor, *, rank: int, scaling: float, spare: Tensor | None = None) -> Fit:
    """The factors of LoRA that are closest to dW.

    Args:
        update: dW [out, in], of the first stage (see `dense_update`).
        rank: Of the LoRA.
        scaling: Of the LoRA, alpha / rank: scaling * B A is the closest matrix to dW.
        spare: [rank, in], see `fit_rank`; None for zeros.

    Returns:
        The factors in float64, the norm of what they leave out, and that of dW.

    Raises:
        UserError: The rank is above the number of singular values.
    """
    return fit_rank(update, rank, scaling=scaling, spare=spare)
