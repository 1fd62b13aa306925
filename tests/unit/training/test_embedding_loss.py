"""The loss of embeddings: its values and gradients, and what counts as a negative."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flora_train.training.embedding_loss import (
    DrawEmbeddings,
    DrawTexts,
    contrastive_losses,
    known_pairs,
)
from tests.unit.training.embedding_reference import contrastive


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_losses_and_gradients_equal_the_definition(parts: int, temperature: float, symmetric: bool) -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(parts, 6, 5))
    texts = [["a", "b", "c", "a", "e", "p2"], ["p0", "p1", "p2", "p3", "p1", "p5"], list("uvwxyz")][:parts]
    expected = contrastive(values, texts, temperature=temperature, symmetric=symmetric)
    leaves = [torch.tensor(part, requires_grad=True) for part in values]
    losses = contrastive_losses(
        DrawEmbeddings(*leaves), DrawTexts(*texts), temperature=temperature, symmetric=symmetric
    )
    losses.sum().backward()
    assert losses.tolist() == pytest.approx(expected.losses, rel=1e-12, abs=1e-12)
    for leaf, gradient in zip(leaves, expected.gradients, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.numpy(), gradient, rtol=1e-9, atol=1e-12)


def test_known_pairs_of_a_draw_are_no_negatives() -> None:
    """Of the anchor, of the same anchor in another row, and the anchor's own text."""
    texts = DrawTexts(["q", "r", "q", "s"], ["a", "a", "b", "r"], ["a", "n", "m", "k"])
    assert known_pairs(texts).int().tolist() == [
        [0, 1, 1, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_a_draw_of_one_text_has_no_loss_and_no_gradient() -> None:
    values = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    losses = contrastive_losses(
        DrawEmbeddings(values[0], values[1]),
        DrawTexts(["a", "b", "c"], ["p", "p", "p"]),
        temperature=0.05,
        symmetric=False,
    )
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0, 0.0]
    assert values.grad is not None
    assert not values.grad.any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_embeddings_of_zeros_give_finite_gradients(symmetric: bool) -> None:
    values = torch.zeros(2, 3, 4, requires_grad=True)
    losses = contrastive_losses(
        DrawEmbeddings(values[0], values[1]),
        DrawTexts("abc", "xyz"),
        temperature=1e-4,
        symmetric=symmetric,
    )
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([np.log(3)] * 3)
    assert values.grad is not None
    assert values.grad.isfinite().all()


def test_losses_stay_finite_at_the_lowest_temperature() -> None:
    anchors = torch.eye(4)
    losses = contrastive_losses(
        DrawEmbeddings(anchors, -anchors), DrawTexts("abcd", "wxyz"), temperature=1e-4, symmetric=True
    )
    assert losses.tolist() == pytest.approx([1e4 + np.log(3)] * 4)
