"""Problems and checks that the tests of the LoRA and IA3 kernels share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flora_train.kernels.segments import Segments
from tests.triton_device import DEVICE, TOLERANCE, relative_error

IN, OUT = 37, 71
LENGTHS = pytest.mark.parametrize(
    "lengths", [(0, 7, 0, 1, 63, 128), (24, 24), (1000,)], ids=["ragged", "even", "one"]
)


def segments_of(lengths: tuple[int, ...]) -> Segments:
    return Segments(tuple(sum(lengths[:i]) for i in range(len(lengths) + 1)))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def exactly(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_close(mine: tuple[Tensor, ...], exact: list[Tensor], dtype: torch.dtype) -> None:
    for tensor, reference in zip(mine, exact, strict=True):
        assert tensor.grad is not None
        assert reference.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        assert relative_error(tensor.grad, reference.grad) <= TOLERANCE[dtype]
