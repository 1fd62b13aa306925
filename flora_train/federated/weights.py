"""The shares of clients in an average, and averages of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.config.errors import user_error


def shares_of(examples: Sequence[int]) -> list[float]:
    """The share of each client, by its number of examples.

    Args:
        examples: Examples of each client, at least 1 each.

    Returns:
        Shares that sum to 1.

    Raises:
        UserError: There is no client, or one without examples.
    """
    if not examples:
        raise user_error("clients", 0, "no client answered: there is nothing to average")
    for count in examples:
        if count < 1:
            raise user_error("examples", count, "a client must have at least 1 example")
    total = sum(examples)
    return [count / total for count in examples]


def weighted_mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """sum_k shares_k tensors_k, summed in float64.

    Args:
        tensors: One per client, all of one shape and dtype.
        shares: One per client.

    Returns:
        The mean in their shape and dtype.
    """
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.to(torch.float64), alpha=share)
    return total.to(tensors[0].dtype)
