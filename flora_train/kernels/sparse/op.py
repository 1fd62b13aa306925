"""Sparse changes of a weight for a batch of adapters: the public op."""

from __future__ import annotations

import torch
from torch import Tensor

from flora_train.kernels.autocast import no_autocast
from flora_train.kernels.segments import Segments, check_shape
from flora_train.kernels.sparse.dense import DenseSparse
from flora_train.kernels.sparse.gathered import GatheredSparse

LARGEST_GATHERED_DENSITY = 0.01
"""On a CPU, the share of a weight's entries up to which gathers are used instead of dense matmuls: about
where both took the same time on one core of an EPYC (at 0.003, gathers took half of it)."""


def sparse_add(y: Tensor, x: Tensor, values: Tensor, indices: Tensor, *, segments: Segments) -> Tensor:
    """y_t + dW_k x_t for every token t of segment k; may overwrite y (see `sparse_reference`).

    Args:
        y: [T, out], output of the frozen layer.
        x: [T, in], cast to y's dtype.
        values: [K, n], float32 masters.
        indices: int64 [n], the flat positions of the values in a weight [out, in], rising.
        segments: K segments of T tokens.

    Returns:
        [T, out] in y's dtype. Differentiable once, in y, x and values.

    Raises:
        ValueError: Shapes do not agree.
    """
    check_shape("y", y.shape, (segments.tokens, y.shape[-1]))
    check_shape("x", x.shape, (segments.tokens, x.shape[-1]))
    check_shape("values", values.shape, (len(segments), len(indices)))
    # A module hook on the base layer makes y a view, which autograd does not allow to be changed in place.
    if y._is_view() or not y.is_contiguous():
        y = y.clone(memory_format=torch.contiguous_format)
    # Under autocast the base layer's output has another dtype than its input.
    x = x.to(y.dtype)
    density = len(indices) / (y.shape[1] * x.shape[1])
    # On a GPU, index_add sums in an order that changes from run to run; matmuls do not.
    gathers = x.device.type == "cpu" and density <= LARGEST_GATHERED_DENSITY
    form = GatheredSparse if gathers else DenseSparse
    with no_autocast(x):
        return form.apply(y, x, values, indices, segments)
