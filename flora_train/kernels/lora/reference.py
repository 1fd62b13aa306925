"""The specification of LoRA, against which the fast implementations are tested."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flora_train.kernels.segments import Segments


def lora_reference(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scaling: Sequence[float], segments: Segments
) -> Tensor:
    """y_t + scaling_k (x_t A_k^T) B_k^T for every token t of segment k.

    y: [T, out] output of the frozen layer, x: [T, in], A: [K, r, in], B: [K, out, r], scaling: K numbers.
    Source: Hu et al., "LoRA", ICLR 2022, eq. 3.
    """
    delta = y.new_zeros(y.shape)
    for k, start, end in segments:
        delta[start:end] = scaling[k] * (x[start:end] @ A[k].T.to(x.dtype)) @ B[k].T.to(x.dtype)
    return y + delta
