"""SLoRA's second stage for fLoRA: the modulation of W0 that comes closest to dW.

The paper has LoRA alone. Here W0 * (1 + B A) is fitted to W0 + dW, weighted by W0^2, because an entry of B A
changes the weight by as much as W0 is large there. An entry where W0 is 0 cannot be changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flora_train.config.errors import user_error
from flora_train.export.low_rank import modulation
from flora_train.federated.low_rank import Factors, Fit


def factors_of_modulation(weight: Tensor, update: Tensor, *, rank: int, offset: float) -> Fit:
    """The factors of fLoRA that are close to dW.

    Weighted low-rank approximation has no closed form: the result is a local optimum, the best of several
    starts, always the same ones (see `modulation`).

    Args:
        weight: W0 [out, in].
        update: dW [out, in].
        rank: Of the fLoRA.
        offset: 1 for the residual variant, whose W0 * (B A) is fitted to dW; 0 for the pure one, whose
            W0 * (B A) is fitted to W0 + dW.

    Returns:
        Factors whose columns of B and rows of A have equal norms, the norm of the part of dW that they leave
        out, and that of dW.

    Raises:
        UserError: The rank is above min(out, in).
    """
    if not 1 <= rank <= min(weight.shape):
        hint = f"a matrix of {weight.shape[0]} x {weight.shape[1]} has ranks of at most {min(weight.shape)}"
        raise user_error("rank", rank, hint)
    wide, wanted = weight.double(), update.double()
    B, A = modulation(wide, wanted + (1.0 - offset) * wide, rank)
    factors = _balanced(Factors(A.double(), B.double()))
    got = wide * (offset + factors.dense()) - wide
    return Fit(factors, float((wanted - got).norm()), float(wanted.norm()))


def _balanced(factors: Factors) -> Factors:
    """The same product, where each column of B and row of A have the same norm, as the SVD would give."""
    norms_A, norms_B = factors.A.norm(dim=1), factors.B.norm(dim=0)
    usable = (norms_A > 0) & (norms_B > 0)
    ratio = torch.where(usable, (norms_B / norms_A.clamp_min(1e-300)).sqrt(), 1.0)
    return Factors(factors.A * ratio[:, None], factors.B / ratio, factors.scaling)
