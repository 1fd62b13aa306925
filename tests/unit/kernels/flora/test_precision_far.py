"""fLoRA in half precision keeps its tolerance for every mean of M, not only near 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flora_train.kernels.flora.materialised import RankExpandedFlora, near_one
from flora_train.kernels.flora.op import TORCH_FORMULATIONS
from flora_train.kernels.flora.reference import flora_reference
from flora_train.kernels.flora.triton_op import FusedFlora
from flora_train.kernels.segments import Segments
from tests.triton_device import DEVICE

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
TOKENS, IN, OUT = 96, 64, 48
SEGMENTS = Segments((0, 40, TOKENS))
MEANS = (0.01, 0.1, 0.4, 0.6, 1.001, 2.0, 10.0, -0.1, -1.0)
"""Of M."""


def factors(rank: int, mean: float, offset: float, carried_by: str) -> tuple[Tensor, Tensor]:
    """A [2, rank, in] and B [2, out, rank] with M within some per cent of `mean`. carried_by: which of them
    is far from 1, or whether all components share it."""
    generator, target = torch.Generator().manual_seed(rank), mean - offset

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A, B = random(2, rank, IN), 0.05 * abs(target) * random(2, OUT, rank) / rank**0.5
    large, sign = abs(target) ** 0.5, 1.0 if target > 0 else -1.0
    of_a, of_b = {
        "A": (target, 1.0),
        "B": (1.0, target),
        "both": (large, sign * large),
        "all": (1.0, target / rank),
    }[carried_by]
    parts = slice(None) if carried_by == "all" else slice(1)
    A[:, parts] = of_a * (1 + 0.05 * random(2, rank, IN)[:, parts])
    B[:, :, parts] = of_b * (1 + 0.05 * random(2, OUT, rank)[:, :, parts])
    return A.to(DEVICE), B.to(DEVICE)


def errors(
    op: Any, dtype: torch.dtype, A: Tensor, B: Tensor, offset: float, split: bool = True
) -> list[float]:
    """Relative root mean square error of y and of the gradients of x, A and B, against float64."""
    generator = torch.Generator().manual_seed(9)
    x, weight, dy = (
        (torch.randn(*shape, generator=generator) / scale).to(dtype).to(DEVICE)
        for shape, scale in (((TOKENS, IN), 1), ((OUT, IN), IN**0.5), ((TOKENS, OUT), 1))
    )
    ours, exact = ([tensor.to(kind).requires_grad_() for tensor, kind in pairs] for pairs in (
        ((x.clone(), dtype), (A.clone(), A.dtype), (B.clone(), B.dtype)),
        ((x, torch.float64), (A, torch.float64), (B, torch.float64)),
    ))  # fmt: skip
    y = op.apply(ours[0], weight, ours[1], ours[2], [offset] * 2, SEGMENTS, split)
    expected = flora_reference(
        exact[0], weight.double(), exact[1], exact[2], offset=[offset] * 2, segments=SEGMENTS
    )
    y.backward(dy)
    expected.backward(dy.double())
    pairs = [(y, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    return [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["pure", "residual"])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", TORCH_FORMULATIONS)
def test_half_precision_keeps_its_tolerance_wherever_m_is(
    name: str, rank: int, offset: float, dtype: torch.dtype
) -> None:
    for mean in MEANS:
        for carried_by in ("A", "B", "both", "all"):
            found = errors(TORCH_FORMULATIONS[name], dtype, *factors(rank, mean, offset, carried_by), offset)
            assert max(found) <= TOLERANCE[dtype], (mean, carried_by, found)


@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["pure", "residual"])
@pytest.mark.parametrize("mean", [0.1, 1.001])
def test_our_kernels_keep_the_tolerance_of_bfloat16_near_zero(mean: float, offset: float) -> None:
    assert max(errors(FusedFlora, torch.bfloat16, *factors(4, mean, offset, "B"), offset)) <= 1e-2


def test_near_one_calls_what_is_not_finite_near() -> None:
    A, B = torch.ones(4, 2, 3), torch.ones(4, 5, 2)
    B[0], B[1], B[2], A[3] = 0.2, 0.3, float("nan"), float("inf")
    assert near_one(A, B, torch.zeros(4)).tolist() == [False, True, True, True]
    assert near_one(A, B, torch.ones(4)).tolist() == [True] * 4


@pytest.mark.parametrize("name", TORCH_FORMULATIONS)
@pytest.mark.parametrize("offset", [[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
def test_extreme_or_nonfinite_adapter_does_not_change_the_other(name: str, offset: list[float]) -> None:
    A, B = factors(4, 1.01, offset[1], "B")
    x, weight = torch.randn(TOKENS, IN).bfloat16().to(DEVICE), torch.randn(OUT, IN).bfloat16().to(DEVICE)
    alike = []
    for other in (1.0, float("nan"), float("inf")):
        A_of, B_of = A.clone(), B.clone()
        B_of[0] *= other
        alike.append(TORCH_FORMULATIONS[name].apply(x, weight, A_of, B_of, offset, SEGMENTS, True)[40:])
    assert all(torch.equal(one, alike[0]) for one in alike)


def test_rank_expansion_as_on_a_gpu_equals_that_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU gives x W0^T in float32 instead of taking it apart."""
    if DEVICE.type != "cpu":
        pytest.skip("is the GPU's own way here")

    class OnGpu(Tensor):
        is_cuda = True

    mm = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, **options: mm(a.float(), b.float()) if options else mm(a, b)
    )
    for mean in MEANS:
        for offset in (0.0, 1.0):
            A, B = factors(4, mean, offset, "both")
            x, weight = torch.randn(TOKENS, IN).bfloat16(), (torch.randn(OUT, IN) / IN**0.5).bfloat16()
            expected = flora_reference(
                x.double(), weight.double(), A.double(), B.double(), offset=[offset] * 2, segments=SEGMENTS
            )
            y = RankExpandedFlora.forward(
                _Context(), x.as_subclass(OnGpu), weight, A, B, [offset] * 2, SEGMENTS, True
            )
            assert float((y.as_subclass(Tensor).double() - expected).norm() / expected.norm()) <= 1e-2


class _Context:
    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors
