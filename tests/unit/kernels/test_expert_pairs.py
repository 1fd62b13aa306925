"""Pairs of tokens and experts: their order, conversions and gradients."""

from __future__ import annotations

import pytest
import torch

from flora_train.kernels.expert_pairs import UNUSED, combine_pairs, gather_pairs, group_pairs
from flora_train.kernels.segments import Segments

SEGMENTS = Segments((0, 3, 3, 7))
"""Tokens of three adapters, the second of which has none."""
COUNT = 4
EXPERTS = torch.tensor([[0, 3], [3, 1], [0, 1], [2, 0], [1, UNUSED], [0, 2], [UNUSED, UNUSED]])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pairs_are_grouped_by_adapter_and_expert_in_the_order_of_the_tokens() -> None:
    pairs = group_pairs(EXPERTS, SEGMENTS, COUNT)
    assert len(pairs.segments) == 3 * COUNT
    expected = []
    for first, end in ((0, 3), (3, 3), (3, 7)):
        for expert in range(COUNT):
            expected.append([t for t in range(first, end) if expert in EXPERTS[t].tolist()])
    assert pairs.segments.lengths == tuple(len(tokens) for tokens in expected)
    assert pairs.tokens.tolist() == [token for tokens in expected for token in tokens]
    assert not pairs.all_used
    assert pairs.count == int((EXPERTS != UNUSED).sum())


@pytest.mark.parametrize("used", [True, False], ids=["all slots", "some slots"])
def test_conversions_equal_a_loop_over_slots_in_value_and_every_gradient(used: bool) -> None:
    experts = EXPERTS.clamp_min(1) if used else EXPERTS
    if used:
        experts = torch.stack([experts[:, 0], (experts[:, 0] + 1) % COUNT], dim=1)
    pairs = group_pairs(experts, SEGMENTS, COUNT)
    assert pairs.all_used is used
    x, weights = random(7, 5).requires_grad_(), random(7, 2, seed=1).requires_grad_()
    scale = random(3 * COUNT, seed=2)
    of_pairs = scale.repeat_interleave(torch.tensor(pairs.segments.lengths))
    y = combine_pairs(gather_pairs(x, pairs) * of_pairs[:, None], weights, pairs)
    other_x, other_weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    rows = []
    for token in range(7):
        row = torch.zeros(5, dtype=torch.float64)
        adapter = 0 if token < 3 else 2
        for slot in range(2):
            expert = int(experts[token, slot])
            if expert != UNUSED:
                row = row + other_weights[token, slot] * other_x[token] * scale[adapter * COUNT + expert]
        rows.append(row)
    expected = torch.stack(rows)
    assert torch.allclose(y, expected, atol=1e-12)
    upstream = random(7, 5, seed=3)
    y.backward(upstream)
    expected.backward(upstream)
    assert x.grad is not None
    assert weights.grad is not None
    assert other_x.grad is not None
    assert other_weights.grad is not None
    assert torch.allclose(x.grad, other_x.grad, atol=1e-12)
    assert torch.allclose(weights.grad, other_weights.grad, atol=1e-12)


def test_no_pairs_at_all() -> None:
    pairs = group_pairs(torch.full((4, 2), UNUSED), Segments((0, 4)), 3)
    assert pairs.count == 0
    x = random(4, 3)
    assert torch.equal(combine_pairs(gather_pairs(x, pairs), random(4, 2), pairs), torch.zeros_like(x))


def test_float32_values_are_combined_under_autocast_of_16_bits() -> None:
    """Such as the hidden features of gelu_new, which autocast leaves in float32 on a GPU."""
    pairs = group_pairs(torch.tensor([[0, 1], [1, 0]]), Segments((0, 2)), 2)
    values, weights = torch.randn(4, 3, requires_grad=True), torch.rand(2, 2, requires_grad=True)
    exact = combine_pairs(values, weights, pairs)
    with torch.autocast("cpu", torch.bfloat16):
        y = combine_pairs(values, weights, pairs)
        y.sum().backward()
    assert torch.equal(y, exact)
    assert values.grad is not None
    assert weights.grad is not None
