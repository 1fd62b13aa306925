"""bfloat16 in Triton's interpreter is wrong without tests/bfloat16_interpreter.py, and right with it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from tests import bfloat16_interpreter
from tests.triton_device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU multiplies bfloat16 itself")


@triton.jit
def _product(a, b, c, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    places = rows * N + columns
    tl.store(c + places, tl.dot(tl.load(a + places), tl.load(b + places)).to(tl.bfloat16))


def multiplied() -> tuple[Tensor, Tensor]:
    """The interpreter's product and the exact one, rounded."""
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    c = torch.empty_like(a)
    _product[(1,)](a, b, c, 16)
    return c, (a.double() @ b.double()).bfloat16()


@pytest.fixture
def as_triton_ships() -> Iterator[None]:
    InterpreterBuilder.create_dot = bfloat16_interpreter.ORIGINAL_DOT
    InterpreterBuilder.cast_impl = bfloat16_interpreter.ORIGINAL_CAST
    yield
    bfloat16_interpreter.install()


def test_a_product_is_right() -> None:
    ours, exact = multiplied()
    assert torch.equal(ours, exact)


@pytest.mark.usefixtures("as_triton_ships")
def test_a_product_is_wrong_as_triton_ships() -> None:
    """When this fails, delete tests/bfloat16_interpreter.py."""
    ours, exact = multiplied()
    assert not torch.allclose(ours.float(), exact.float(), rtol=0.1)


def test_rounding_is_torch_s() -> None:
    numbers = torch.cat(
        [torch.randn(1000), torch.tensor([1.00390625, 1.01171875, 0.0, -0.0, float("inf"), float("nan")])]
    )
    ours = torch.from_numpy(bfloat16_interpreter.narrowed(numbers.numpy()).view(np.int16)).view(
        torch.bfloat16
    )
    assert torch.equal(ours.nan_to_num(7.0), numbers.bfloat16().nan_to_num(7.0))
