"""The specification of DoRA, against which the fast implementation is tested."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.kernels.segments import Segments


def dora_reference(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    *,
    scaling: Sequence[float],
    segments: Segments,
    dropped: Tensor | None = None,
) -> Tensor:
    """W0 x_t + (c_k - 1) W0 d_t + c_k scaling_k B_k A_k d_t for every token t of segment k, as in PEFT.

    c_k = magnitude_k / |W0 + scaling_k B_k A_k|, a number per output; its denominator is a constant for the
    gradient. d is x after dropout; without dropout the sum is (c_k (W0 + scaling_k B_k A_k)) x_t.

    x: [T, in], weight: [out, in], A: [K, r, in], B: [K, out, r], magnitude: [K, out], scaling: K numbers,
    dropped: [T, in], default x. Source: Liu et al., "DoRA", ICML 2024, eq. 5 and section 4.3.
    """
    dropped = x if dropped is None else dropped
    y = x.new_empty(len(x), len(weight))
    for k, start, end in segments:
        update = scaling[k] * (B[k] @ A[k])
        norm = torch.linalg.vector_norm(weight + update, dim=1).detach()
        factor = (magnitude[k] / norm).to(x.dtype)
        base, inputs = x[start:end] @ weight.T, dropped[start:end]
        y[start:end] = base + (factor - 1) * (inputs @ weight.T) + factor * (inputs @ update.T.to(x.dtype))
    return y
