"""The product of groups of tokens with a matrix each equals a loop in float64, and so does LoRA on many short
segments."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flora_train.kernels.grouped_matmul import grouped_linear, grouped_matmul
from flora_train.kernels.segments import Segments
from tests.unit.kernels.segmented import IN, LENGTHS, OUT, assert_close, exactly, random, segments_of

SCATTERED = (0, 57, 3, 0, 101, 13, 64)
"""Lengths without a common unit, as the tokens of experts have."""


@LENGTHS
def test_grouped_matmul_and_its_gradients_equal_a_loop(lengths: tuple[int, ...]) -> None:
    segments = segments_of(lengths)
    x, weights = random(segments.tokens, IN, seed=1), random(len(lengths), IN, OUT, seed=2, scale=0.1)
    dy = random(segments.tokens, OUT, seed=3)
    exact = exactly(x, weights)
    expected = torch.cat([exact[0][start:end] @ exact[1][g] for g, start, end in segments])
    expected.backward(dy.double())
    mine = x.requires_grad_(), weights.requires_grad_()
    y = grouped_matmul(*mine, segments)
    y.backward(dy)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(mine, exact, torch.float32)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_linear_equals_a_linear_layer_of_each_expert(transposed: bool) -> None:
    segments = segments_of(SCATTERED)
    x = random(segments.tokens, IN, seed=1).requires_grad_()
    bias = random(len(SCATTERED), OUT, seed=4)
    weights = random(len(SCATTERED), OUT, IN, seed=2)
    if transposed:
        weights = weights.mT.contiguous().mT
    y = grouped_linear(x, weights, bias, segments)
    parts = [F.linear(x[start:end], weights[e], bias[e]) for e, start, end in segments]
    torch.testing.assert_close(y, torch.cat(parts), rtol=1e-5, atol=1e-5)
    (mine,) = torch.autograd.grad(y.square().sum(), x)
    (theirs,) = torch.autograd.grad(torch.cat(parts).square().sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    assert not y._is_view()


def test_grouped_matmul_refuses_shapes_that_do_not_agree() -> None:
    with pytest.raises(ValueError, match="weights has shape"):
        grouped_matmul(torch.ones(4, 3), torch.ones(1, 3, 2), Segments((0, 2, 4)))
    with pytest.raises(ValueError, match="x has shape"):
        grouped_matmul(torch.ones(5, 3), torch.ones(2, 3, 2), Segments((0, 2, 4)))
