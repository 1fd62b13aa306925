"""Products with W0 * (c + B A) of a server equal the reference of each segment."""

from __future__ import annotations

import pytest
import torch

from flora_train.kernels.flora.inference import multiply_modulated
from flora_train.kernels.segments import Segments


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("constant", [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
def test_every_segment_is_multiplied_by_its_own_weight(add: bool, constant: list[float]) -> None:
    torch.manual_seed(0)
    segments = Segments((0, 3, 3, 8))
    x, weight = torch.randn(8, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    A, B = torch.randn(3, 2, 6, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64).mT
    before = torch.randn(8, 9, dtype=torch.float64) if add else torch.full((8, 9), torch.nan).double()
    y = before.clone()
    multiply_modulated(y[:, 2:7], x, weight, A, B, constant=constant, segments=segments, add=add)
    for k, start, end in segments:
        expected = x[start:end] @ (weight * (constant[k] + B[k] @ A[k])).T
        if add:
            expected += before[start:end, 2:7]
        torch.testing.assert_close(y[start:end, 2:7], expected, rtol=1e-12, atol=1e-12)
    assert y[:, [0, 1, 7, 8]].equal(before[:, [0, 1, 7, 8]]) or not add
