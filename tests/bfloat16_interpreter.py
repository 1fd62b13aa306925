"""Corrects bfloat16 in Triton's interpreter.

The interpreter stores bfloat16 as uint16: its matmul multiplies these as integers, and its casts truncate
instead of rounding. `install` corrects both; `test_interpreter.py` fails when Triton no longer needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Handle = Any
ORIGINAL_DOT: Callable[..., Handle] = InterpreterBuilder.create_dot
ORIGINAL_CAST: Callable[..., Handle] = InterpreterBuilder.cast_impl
ORIGINAL_BINARY: Callable[..., Handle] = InterpreterBuilder.binary_op


def install() -> None:
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.binary_op = _binary


def widened(bits: np.ndarray) -> np.ndarray:
    """uint16 -> the float32 they mean."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(numbers: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16's bits, to the nearest, ties to even."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def _is_bfloat16(type_: Any) -> bool:
    return getattr(type_, "scalar", type_) == tl.bfloat16


def _dot(self: Any, a: Handle, b: Handle, d: Handle, *rest: Any) -> Handle:
    if _is_bfloat16(a.dtype) and _is_bfloat16(b.dtype):
        a, b = (TensorHandle(widened(side.data), tl.float32) for side in (a, b))
    return ORIGINAL_DOT(self, a, b, d, *rest)


def _cast(self: Any, src: Handle, dst_type: Any) -> Handle:
    if _is_bfloat16(src.dtype) and not _is_bfloat16(dst_type):
        return ORIGINAL_CAST(self, TensorHandle(widened(src.data), tl.float32), dst_type)
    if _is_bfloat16(dst_type) and not _is_bfloat16(src.dtype):
        return TensorHandle(narrowed(src.data.astype(np.float32)), tl.bfloat16)
    return ORIGINAL_CAST(self, src, dst_type)


def _binary(self: Any, lhs: Handle, rhs: Handle, op: Callable[..., Any]) -> Handle:
    if _is_bfloat16(lhs.dtype) or _is_bfloat16(rhs.dtype):
        raise TypeError(
            "the interpreter computes with bfloat16's bits: cast to float32 first, as our kernels should"
        )
    return ORIGINAL_BINARY(self, lhs, rhs, op)
