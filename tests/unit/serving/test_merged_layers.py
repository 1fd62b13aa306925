"""Merged weights of served layers compute what the unmerged projection computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from flora_train.serving.batch_rows import BatchRows
from flora_train.serving.layer_plan import SlotUse
from flora_train.serving.merged_layers import MergedWeight, merged_lora, merged_multipliers
from flora_train.serving.projection import LayerFactors, project

INPUTS, SIZES, RANK, SLOTS, TOKENS = 24, (16, 8, 8), 5, 3, 6
SLOT = 1
USES = {
    "residual": SlotUse((5, 2, 0), (True, True, True), ("", "", "")),
    "pure": SlotUse((3, 0, 1), (False, True, False), ("", "", "")),
    "ia3 of outputs": SlotUse((1, 0, 1), (True, True, True), ("output", "", "output")),
    "ia3 of inputs": SlotUse((1, 1, 1), (True, True, True), ("input", "input", "input")),
    "ia3 of both": SlotUse((1, 1, 0), (True, True, True), ("input", "output", "")),
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("with_bias", [True, False])
def test_merged_multipliers_equal_the_projection(use: SlotUse, with_bias: bool) -> None:
    weight, x = random(sum(SIZES), INPUTS), random(TOKENS, INPUTS)
    before = weight.clone()
    bias = random(sum(SIZES)) if with_bias else None
    A = [random(SLOTS, RANK, INPUTS) + s for s in range(len(SIZES))]
    B = [random(SLOTS, RANK, size) for size in SIZES]
    rows = BatchRows({SLOT: tuple(range(TOKENS))}, False, torch.device("cpu"))
    factors = LayerFactors(A, B, {SLOT: use})

    def product(tokens: Tensor, s: int | None) -> Tensor:
        return linear(tokens, weight if s is None else weight.split(SIZES)[s])

    expected = project(x, factors, rows, product=product, weight=lambda: weight, bias=bias)
    merged = merged_multipliers(weight, [part[SLOT] for part in A], [part[SLOT] for part in B], use)
    torch.testing.assert_close(merged.product(x, bias), expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(expected, linear(x, weight, bias), atol=1e-2)
    assert torch.equal(weight, before)
    assert merged.bytes == weight.numel() * 4


def test_merged_lora_adds_the_product_on_every_slice() -> None:
    weight, x, bias = random(sum(SIZES), INPUTS), random(TOKENS, INPUTS), random(sum(SIZES))
    before = weight.clone()
    A = [random(RANK, INPUTS) + s for s in range(len(SIZES))]
    B = [random(size, RANK) for size in SIZES]
    deltas = [slice_B @ slice_A for slice_A, slice_B in zip(A, B, strict=True)]
    expected = linear(x, weight, bias) + linear(x, torch.cat(deltas))
    merged = merged_lora(weight, A, B)
    torch.testing.assert_close(merged.product(x, bias), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(weight, before)


def test_a_transposed_weight_is_merged_too() -> None:
    weight = random(INPUTS, 8).T
    merged = merged_lora(weight, [random(2, INPUTS)], [random(8, 2)])
    assert merged.weight.is_contiguous()
    torch.testing.assert_close(merged.weight, weight + random(8, 2) @ random(2, INPUTS))


def test_the_bias_is_scaled_only_by_an_ia3_of_outputs() -> None:
    weight, bias, x = torch.eye(3), torch.ones(3), torch.zeros(1, 3)
    assert MergedWeight(weight).product(x, bias).tolist() == [[1, 1, 1]]
    assert MergedWeight(weight, torch.tensor([1.0, 2.0, 3.0])).product(x, bias).tolist() == [[1, 2, 3]]
    assert MergedWeight(weight, torch.tensor([1.0, 2.0, 3.0])).product(x, None).tolist() == [[0, 0, 0]]
