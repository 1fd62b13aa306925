"""Values as a list of numpy arrays, which Flower and others send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora_train.config.errors import user_error
from flora_train.federated.fedex import Residual
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


def residual_arrays(residuals: Mapping[str, Residual]) -> list[NDArray[Any]]:
    """One or two arrays per layer, in the order of the layers' names."""
    arrays = []
    for module in sorted(residuals):
        arrays += [tensor.detach().cpu().numpy().copy() for tensor in residuals[module].tensors]
    return arrays


def residuals_from_arrays(
    arrays: Sequence[NDArray[Any]], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Residual]:
    """The residuals that `residual_arrays` made these arrays of.

    Args:
        arrays: In its order.
        shapes: Layer -> (out, in), of all layers of the adapter.

    Returns:
        Layer -> residual.

    Raises:
        UserError: The arrays are not those of these layers.
    """
    left = [torch.tensor(np.ascontiguousarray(array)) for array in arrays]
    residuals: dict[str, Residual] = {}
    for module in sorted(shapes):
        # Factors are sent only where their rank is below the width: no B has the shape of the weight.
        count = 1 if left and tuple(left[0].shape) == shapes[module] else 2
        tensors, left = tuple(left[:count]), left[count:]
        if len(tensors) < count or _shape_of(tensors) != shapes[module]:
            raise user_error(module, len(arrays), f"these arrays hold no residual of {shapes[module]}")
        residuals[module] = Residual(tensors)
    if left:
        raise user_error("arrays", len(arrays), f"there are {len(left)} more than the layers need")
    return residuals


def _shape_of(tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
    """The shape of the matrix that one tensor is, or that two are the factors of; None if they are not."""
    if len(tensors) == 1:
        return tuple(tensors[0].shape)
    B, A = tensors
    if B.dim() != 2 or A.dim() != 2 or B.shape[1] != A.shape[0]:
        return None
    return B.shape[0], A.shape[1]
