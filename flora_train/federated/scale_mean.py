"""The average of IA3's scales, which is exact: a layer is linear in its scale."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flora_train.federated.weights import weighted_mean


def mean_of_scales(scales: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """sum_k w_k l_k, [features]: the layer that computes the mean of the clients' outputs."""
    return weighted_mean(scales, shares)
