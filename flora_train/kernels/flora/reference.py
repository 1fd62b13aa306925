"""The specification of fLoRA, against which the fast implementations are tested."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.kernels.segments import Segments


def flora_reference(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *, offset: Sequence[float], segments: Segments
) -> Tensor:
    """y_t = x_t (W0 * (offset_k + B_k A_k))^T for every token t of segment k.

    x: [T, in], weight: [out, in], A: [K, r, in], B: [K, out, r], offset: K numbers, 0 (pure) or 1 (residual).
    Returns [T, out] in x's dtype. Source: Wen & Chaudhuri, "Batched Low-Rank Adaptation of Foundation
    Models", ICLR 2024, eq. 3 (offset 0); Huang et al., "HiRA", ICLR 2025 (offset 1). The bias is not
    modulated.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    for k, start, end in segments:
        modulated = weight * (offset[k] + B[k] @ A[k])
        y[start:end] = x[start:end] @ modulated.T.to(x.dtype)
    return y


def modulated_weight(weight: Tensor, A: Tensor, B: Tensor, *, offset: float) -> Tensor:
    """W0 * (offset + B A) of one adapter: A [r, in], B [out, r], weight [out, in]; computed in float32 or
    wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * (offset + B.to(wide) @ A.to(wide))).to(weight.dtype)
