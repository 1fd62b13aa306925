"""Values as a list of numpy arrays, which Flower and others send, and how bytes from a stranger are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora_train.config.errors import UserError, user_error
from flora_train.federated.fedex import Residual
from flora_train.federated.values import AdapterValues

READABLE = frozenset(np.dtype(kind) for kind in (np.float16, np.float32, np.float64))
"""Types of numbers that are read, in the byte order of this machine."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Header:
    """What a file of numpy's format (npy) says about its array."""

    shape: Shape
    columns_first: bool
    dtype: np.dtype[Any]
    begin: int
    """Bytes before the numbers."""


def read_array(data: bytes, name: str, shape: Shape | None = None) -> NDArray[Any]:
    """The array in bytes of numpy's format, which may come from anybody.

    Type, shape and length are compared before anything is allocated: the array is a view of the bytes.

    Args:
        data: Of one array, as `numpy.save` writes it.
        name: Of the tensor, for errors.
        shape: That it must have. Default: any, which the bytes fill.

    Returns:
        The array, which cannot be written to.

    Raises:
        UserError: The bytes hold no array of real numbers, one of another shape, or more or fewer numbers.
    """
    try:
        return _read_array(data, name, shape)
    except UserError:
        raise
    except Exception as error:  # bytes that are no array raise errors of many types
        raise user_error(name, None, f"does not hold an array ({type(error).__name__})") from error


def bytes_of_numbers(data: bytes) -> int:
    """The bytes of an array without its header; all of them if there is none."""
    try:
        return len(data) - _header(data).begin
    except Exception:  # as in `read_array`
        return len(data)


def _read_array(data: bytes, name: str, shape: Shape | None) -> NDArray[Any]:
    header = _header(data)
    _check_numbers(name, header.dtype)
    if shape is not None and header.shape != shape:
        raise user_error("values", None, f"{name} has shape {header.shape}, expected {shape}")
    if any(size < 0 for size in header.shape):
        raise user_error(name, None, f"does not hold an array: its shape is {header.shape}")
    count, length = math.prod(header.shape), len(data) - header.begin
    if count * header.dtype.itemsize != length:
        hint = f"has {length:,} bytes for shape {header.shape} of {header.dtype}"
        raise user_error(name, None, hint)
    numbers = np.frombuffer(data, dtype=header.dtype, count=count, offset=header.begin)
    if header.columns_first:
        return numbers.reshape(header.shape, order="F")
    return numbers.reshape(header.shape)


def _header(data: bytes) -> _Header:
    """Raises ValueError, and errors of other types, for bytes that do not begin with a header."""
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, columns_first, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} is not read")
    return _Header(shape, columns_first, dtype, file.tell())


def _check_numbers(name: str, dtype: object) -> None:
    if not isinstance(dtype, np.dtype) or dtype not in READABLE:
        hint = "an adapter has real numbers: float16, float32 or float64, in this machine's byte order"
        raise user_error(name, str(dtype), hint)


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
        if not isinstance(array, np.ndarray):
            raise user_error(name, type(array).__name__, "is no array")
        _check_numbers(name, array.dtype)

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
