"""The kernel that merges experts into many layers at once, against the formula in float64: in Triton's
interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flora_train.kernels.merge_triton import FusedMerge, MergedMatrix
from tests.triton_device import DEVICE, DTYPES, relative_error
from tests.unit.kernels.segmented import random

pytestmark = pytest.mark.usefixtures("memory_full_of_nan")
SHAPES = ((71, 37), (64, 128), (5, 130))
EXPERTS, RANK = 3, 5
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def problem(dtype: torch.dtype, rank: int = RANK) -> tuple[list[MergedMatrix], Tensor]:
    """Layers of several shapes, one of them stored transposed, and the values of all experts."""
    matrices, start = [], 3
    for number, (outs, ins) in enumerate(SHAPES):
        weight = random(outs, ins, seed=number, dtype=dtype)
        if number == 1:
            weight = weight.T.contiguous().T
        merged = torch.empty(outs, ins, dtype=dtype, device=DEVICE)
        A, B = start, start + EXPERTS * rank * ins
        start = B + EXPERTS * outs * rank
        matrices.append(MergedMatrix(weight, merged, A, B))
    return matrices, random(start, seed=9)


def expected(
    matrix: MergedMatrix, values: Tensor, experts: list[int], factors: list[float], multiply: bool, rank: int
) -> Tensor:
    outs, ins = matrix.weight.shape
    A = values[matrix.A :][: EXPERTS * rank * ins].view(EXPERTS, rank, ins).double()
    B = values[matrix.B :][: EXPERTS * outs * rank].view(EXPERTS, outs, rank).double()
    product = sum(factor * (B[e] @ A[e]) for e, factor in zip(experts, factors, strict=True))
    weight = matrix.weight.double()
    if multiply:
        return weight * (1.0 + product)
    return weight + product


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiply", [False, True], ids=["add", "multiply"])
@pytest.mark.parametrize(
    ("experts", "factors"), [([2], [1.0]), ([1, 0], [0.3, 1.4]), ([0, 1, 2], [0.2, 0.5, 0.3])]
)
def test_all_layers_are_merged_in_one_launch(
    dtype: torch.dtype, multiply: bool, experts: list[int], factors: list[float]
) -> None:
    matrices, values = problem(dtype)
    before = [matrix.weight.clone() for matrix in matrices]
    merge = FusedMerge(matrices, RANK, multiply=multiply)
    merge(values, torch.tensor(experts, device=DEVICE), torch.tensor(factors, device=DEVICE))
    for matrix, weight in zip(matrices, before, strict=True):
        exact = expected(matrix, values, experts, factors, multiply, RANK)
        assert relative_error(matrix.merged, exact) <= ROUNDING[dtype]
        assert torch.equal(matrix.weight, weight)


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_every_rank(rank: int) -> None:
    matrices, values = problem(torch.float32, rank)
    FusedMerge(matrices, rank, multiply=False)(
        values, torch.tensor([1], device=DEVICE), torch.tensor([0.5], device=DEVICE)
    )
    for matrix in matrices:
        assert relative_error(matrix.merged, expected(matrix, values, [1], [0.5], False, rank)) <= 1e-6


def test_one_route_after_the_other_does_not_drift() -> None:
    matrices, values = problem(torch.bfloat16)
    merge = FusedMerge(matrices, RANK, multiply=False)
    one = torch.ones(1, device=DEVICE)
    merge(values, torch.tensor([0], device=DEVICE), one)
    first = [matrix.merged.clone() for matrix in matrices]
    for expert in (1, 2, 1, 0):
        merge(values, torch.tensor([expert], device=DEVICE), one)
    assert all(torch.equal(m.merged, before) for m, before in zip(matrices, first, strict=True))


def test_weights_that_the_table_cannot_describe_are_refused() -> None:
    matrices, _ = problem(torch.float32)
    wrong = MergedMatrix(matrices[0].weight, matrices[0].merged.T, 0, 0)
    with pytest.raises(ValueError, match="contiguous"):
        FusedMerge([wrong], RANK, multiply=False)
    other = problem(torch.float16)[0]
    with pytest.raises(ValueError, match="same dtype"):
        FusedMerge([matrices[0], other[1]], RANK, multiply=False)
