"""The specification of a sparse change of a weight, against which the fast implementations are tested."""

from __future__ import annotations

from torch import Tensor

from flora_train.kernels.segments import Segments


def sparse_reference(y: Tensor, x: Tensor, values: Tensor, indices: Tensor, *, segments: Segments) -> Tensor:
    """y_t + dW_k x_t for every token t of segment k, where dW_k has `values[k]` at the flat `indices`.

    y: [T, out] output of the frozen layer, x: [T, in], values: [K, n], indices: int64 [n], each
    row * in + column of a weight [out, in], rising.
    """
    (_, outputs), inputs = y.shape, x.shape[1]
    delta = y.new_zeros(y.shape)
    for k, start, end in segments:
        change = x.new_zeros(outputs * inputs).index_put((indices,), values[k].to(x.dtype))
        delta[start:end] = x[start:end] @ change.view(outputs, inputs).T
    return y + delta
