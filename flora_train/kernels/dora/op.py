"""DoRA for a batch of adapters: the norms of the adapted weights, and the public op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.kernels.autocast import no_autocast
from flora_train.kernels.ia3.op import ia3_scale
from flora_train.kernels.lora.op import lora_add
from flora_train.kernels.segments import Segments, check_shape

MOST_WIDE = 2**24
"""Weights of a half-precision base that are cast to float32 at a time."""


@torch.no_grad()
def adapted_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: Sequence[float]) -> Tensor:
    """The norm of every row of W0 + scaling_k B_k A_k, [K, out], of K adapters at once.

    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b for a row w of W0 and b of B: no [out, in] matrix is
    formed, and W0 is read once. In float32 or wider, where half precision could not represent small changes.

    weight: [out, in]; A: [K, r, in]; B: [K, out, r]; scaling: K numbers.
    """
    K, rank, in_features = A.shape
    check_shape("A", A.shape, (K, rank, weight.shape[1]))
    check_shape("B", B.shape, (K, weight.shape[0], rank))
    wide = torch.promote_types(A.dtype, torch.float32)
    with no_autocast(A):
        A, B = A.to(wide), B.to(wide)
        stacked = A.reshape(K * rank, in_features).T
        squares, products = [], []
        for rows in weight.detach().split(max(1, MOST_WIDE // in_features)):
            wide_rows = rows.to(wide)
            squares.append(wide_rows.square().sum(dim=1))
            products.append(wide_rows @ stacked)
        cross = torch.cat(products).unflatten(1, (K, rank)).transpose(0, 1)  # [K, out, r]
        scales = torch.tensor(scaling, dtype=wide, device=A.device)[:, None]
        linear = (cross * B).sum(dim=2)
        quadratic = (torch.bmm(B, torch.bmm(A, A.mT)) * B).sum(dim=2)
        squared = torch.cat(squares) + 2 * scales * linear + scales.square() * quadratic
        return squared.clamp_min_(torch.finfo(wide).tiny).sqrt_()


def dora_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    *,
    norms: Tensor,
    scaling: Sequence[float],
    segments: Segments,
) -> Tensor:
    """magnitude_k / norms_k * (y_t + scaling_k (x_t A_k^T) B_k^T) for every token t of segment k; may
    overwrite y.

    y: [T, out], output of the frozen layer without its bias; x: [T, in], cast to y's dtype; A: [K, r, in], B:
    [K, out, r] and magnitude: [K, out], float32 masters; norms: [K, out], of `adapted_norms`, constants for
    the gradient; scaling: K numbers; segments: K segments of T tokens. Differentiable once, in y, x, A, B and
    magnitude. Raises ValueError on shapes that do not agree.
    """
    check_shape("magnitude", magnitude.shape, (len(segments), y.shape[1]))
    check_shape("norms", norms.shape, tuple(magnitude.shape))
    adapted = lora_add(y, x, A, B, scaling=scaling, segments=segments)
    return ia3_scale(adapted, magnitude / norms, segments)
