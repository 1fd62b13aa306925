"""SLoRA's first stage: the average of sparse values, which is exact, because all clients share one mask.

Source: Babakniya et al., "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models", 2023. Its
code was not published. Decided here: the mask is drawn for each matrix separately, with the same density.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.federated.weights import weighted_mean


def mean_of_values(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """sum_k w_k v_k, [n]: the values of the mean of the clients' dW.

    A client begins a round with the global values and sends all of its own, so that the mean of a round is
    the global dW that accumulated until then.
    """
    return weighted_mean(values, shares)


def dense_update(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """dW [out, in], in the dtype of the values.

    Args:
        values: [n].
        indices: int64 [n], flat positions in the weight.
        shape: (out, in).
    """
    dense = values.new_zeros(shape[0] * shape[1])
    dense[indices] = values
    return dense.view(shape)


def added_to(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """W0 + dW in the weight's dtype. weight: [out, in]; values, indices: [n]."""
    update = dense_update(values.to(torch.float64), indices, (weight.shape[0], weight.shape[1]))
    return (weight.double() + update).to(weight.dtype)
