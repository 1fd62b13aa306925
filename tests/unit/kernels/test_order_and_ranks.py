"""Adapters of different rank in one stack, and tokens that do not lie one adapter after the other: every op, both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flora_train.kernels.backend import use_backend
from flora_train.kernels.flora.op import flora_linear
from flora_train.kernels.flora.reference import flora_reference
from flora_train.kernels.ia3.op import ia3_scale
from flora_train.kernels.lora.op import lora_add
from flora_train.kernels.lora.reference import lora_reference
from flora_train.kernels.segments import Segments
from tests.triton_device import DEVICE, relative_error

pytestmark = pytest.mark.usefixtures("backend")
IN, OUT, RANK = 37, 71, 5
BOUNDS, RANKS = (0, 9, 9, 40, 112), (2, 1, 5, 3)
TOKENS, K = BOUNDS[-1], len(BOUNDS) - 1
NUMBERS = [1.0, 0.0, 0.0, 1.0]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    use_backend(request.param, DEVICE)
    yield
    use_backend("auto", DEVICE)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def stacks() -> tuple[Tensor, Tensor]:
    """A and B, full of NaN beyond every adapter's rank."""
    A, B = random(K, RANK, IN, seed=0), random(K, OUT, RANK, seed=1)
    for k, rank in enumerate(RANKS):
        A[k, rank:], B[k, :, rank:] = float("nan"), float("nan")
    return A.requires_grad_(), B.requires_grad_()


def one_by_one(compute: Callable[[int, Tensor, Tensor], Tensor], A: Tensor, B: Tensor) -> Tensor:
    """Each adapter's own tokens through its own factors, cut to its rank, in float64."""
    parts = [compute(k, A[k : k + 1, :rank], B[k : k + 1, :, :rank]) for k, rank in enumerate(RANKS)]
    return torch.cat(parts)


def assert_gradients(mine: Tensor, exact: Tensor) -> None:
    """Those of the ranks in use; beyond them, zero."""
    assert mine.grad is not None
    assert exact.grad is not None
    assert mine.grad.isfinite().all()
    assert relative_error(mine.grad, exact.grad) <= 1e-5
    assert mine.grad[exact.grad == 0].count_nonzero() == 0


@pytest.mark.parametrize("method", ["flora", "lora"])
def test_each_adapter_uses_its_own_rank(method: str) -> None:
    segments = Segments(BOUNDS, RANKS)
    x, weight, (A, B) = random(TOKENS, IN, seed=2).requires_grad_(), random(OUT, IN, seed=3), stacks()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, A, B)]
    one = [Segments((0, b - a)) for a, b in pairwise(BOUNDS)]

    def tokens(k: int) -> Tensor:
        return exact[0][BOUNDS[k] : BOUNDS[k + 1]]

    if method == "flora":
        ours = flora_linear(x, weight, A, B, NUMBERS, segments)
        reference = one_by_one(
            lambda k, A, B: flora_reference(tokens(k), weight.double(), A, B, [NUMBERS[k]], one[k]), exact[1], exact[2]
        )
    else:
        ours = lora_add(x @ weight.T, x, A, B, NUMBERS, segments)
        reference = one_by_one(
            lambda k, A, B: lora_reference(tokens(k) @ weight.double().T, tokens(k), A, B, [NUMBERS[k]], one[k]),
            exact[1],
            exact[2],
        )
    ours.sum().backward()
    reference.sum().backward()
    assert relative_error(ours, reference) <= 1e-5
    for mine, theirs in zip((x, A, B), exact, strict=True):
        assert_gradients(mine, theirs)


@pytest.mark.parametrize("rank", [1, RANK])
@pytest.mark.parametrize("method", ["flora", "lora", "ia3"])
def test_tokens_may_lie_anywhere(method: str, rank: int) -> None:
    segments = Segments(BOUNDS)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    x, weight, dy = random(TOKENS, IN, seed=2), random(OUT, IN, seed=3), random(TOKENS, OUT, seed=4)
    A, B = random(K, rank, IN, seed=6), random(K, OUT, rank, seed=7)

    def run(x: Tensor, order: Tensor | None, dy: Tensor) -> list[Tensor]:
        """y and every gradient."""
        x, a, b = (tensor.clone().requires_grad_() for tensor in (x, A, B))
        if method == "flora":
            y = flora_linear(x, weight, a, b, [0.0] * K, segments, order)
        elif method == "lora":
            y = lora_add(x @ weight.T, x, a, b, NUMBERS, segments, order)
        else:
            y = ia3_scale(x @ weight.T, b[:, :, 0], segments, order)
        y.backward(dy)
        return [y.detach(), x.grad, *(t.grad for t in (a, b) if t.grad is not None)]  # type: ignore[list-item]

    grouped, scattered = run(x[order], None, dy[order]), run(x, order, dy)
    for ours, theirs in zip(scattered[:2], grouped[:2], strict=True):
        torch.testing.assert_close(ours[order], theirs)
    for ours, theirs in zip(scattered[2:], grouped[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("ranks", [(1, 2, 3), (0, 1, 1, 1)])
def test_ranks_that_make_no_sense_are_refused(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one rank from 1 a segment"):
        Segments(BOUNDS, ranks)
