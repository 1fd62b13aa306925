"""Tokens that are not grouped by adapter: every op, both backends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flora_train.kernels.backend import use_backend
from flora_train.kernels.flora.op import flora_linear
from flora_train.kernels.ia3.op import ia3_scale
from flora_train.kernels.lora.op import lora_add
from flora_train.kernels.segments import Segments
from tests.triton_device import DEVICE

pytestmark = pytest.mark.usefixtures("backend")
IN, OUT, RANK = 37, 71, 5
BOUNDS = (0, 9, 9, 40, 112)
TOKENS, K = BOUNDS[-1], len(BOUNDS) - 1
NUMBERS = [1.0, 0.0, 0.0, 1.0]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    use_backend(request.param, DEVICE)
    yield
    use_backend("auto", DEVICE)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("rank", [1, RANK])
@pytest.mark.parametrize("method", ["flora", "lora", "ia3"])
def test_order_gives_the_position_of_every_token(method: str, rank: int) -> None:
    segments = Segments(BOUNDS)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    x, weight, dy = random(TOKENS, IN, seed=2), random(OUT, IN, seed=3), random(TOKENS, OUT, seed=4)
    A, B = random(K, rank, IN, seed=6), random(K, OUT, rank, seed=7)

    def run(x: Tensor, order: Tensor | None, dy: Tensor) -> list[Tensor]:
        """y and every gradient."""
        x, a, b = (tensor.clone().requires_grad_() for tensor in (x, A, B))
        if method == "flora":
            y = flora_linear(x, weight, a, b, offset=[0.0] * K, segments=segments, order=order)
        elif method == "lora":
            y = lora_add(x @ weight.T, x, a, b, scaling=NUMBERS, segments=segments, order=order)
        else:
            y = ia3_scale(x @ weight.T, b[:, :, 0], segments, order=order)
        y.backward(dy)
        return [y.detach(), x.grad, *(t.grad for t in (a, b) if t.grad is not None)]  # type: ignore[list-item]

    grouped, scattered = run(x[order], None, dy[order]), run(x, order, dy)
    for ours, theirs in zip(scattered[:2], grouped[:2], strict=True):
        torch.testing.assert_close(ours[order], theirs)
    for ours, theirs in zip(scattered[2:], grouped[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # sums in another order
