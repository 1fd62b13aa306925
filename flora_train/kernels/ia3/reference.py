"""The specification of IA3, against which the fast implementations are tested."""

from __future__ import annotations

from torch import Tensor

from flora_train.kernels.segments import Segments


def ia3_reference(x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """x_t * scale_k for every token t of segment k. x: [T, d], scale: [K, d].

    Applied to a layer's output, or to the input of a feed-forward layer. Source: Liu et al., "Few-Shot
    Parameter-Efficient Fine-Tuning is Better and Cheaper", NeurIPS 2022, section 3.3.
    """
    y = x.new_empty(x.shape)
    for k, start, end in segments:
        y[start:end] = x[start:end] * scale[k].to(x.dtype)
    return y
