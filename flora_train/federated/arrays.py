"""Values as a list of numpy arrays, which Flower and others send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora_train.config.errors import user_error
from flora_train.federated.values import AdapterValues


def to_arrays(values: AdapterValues) -> list[NDArray[Any]]:
    """One array per tensor, in the order of `AdapterValues.tensors`. bfloat16, which numpy lacks, becomes
    float32."""
    arrays = []
    for _, tensor in values.tensors():
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        arrays.append(tensor.detach().cpu().numpy().copy())
    return arrays


def from_arrays(arrays: Sequence[NDArray[Any]], like: AdapterValues) -> AdapterValues:
    """The values that `to_arrays` made these arrays of.

    Args:
        arrays: In the order of `like.tensors()`.
        like: Values of the same adapter, for names, dtypes and devices. Shapes are those of the arrays, so
            that `rejection_of` can tell which one is wrong.

    Returns:
        The values.

    Raises:
        UserError: There are more or fewer arrays than tensors, or one does not hold numbers.
    """
    names = [name for name, _ in like.tensors()]
    if len(arrays) != len(names):
        raise user_error("arrays", len(arrays), f"this adapter has {len(names)} tensors")
    by_name = dict(zip(names, arrays, strict=True))
    for name, array in by_name.items():
        if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
            raise user_error(name, str(array.dtype), "an adapter has real numbers")

    def as_tensor(name: str, tensor: Tensor) -> Tensor:
        array = np.ascontiguousarray(by_name[name])
        return torch.tensor(array, dtype=tensor.dtype, device=tensor.device)

    return like.map(as_tensor)
