"""Draws follow the distribution, within the nucleus, and depend on seed, key and position only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flora_train.evaluation.generation.sampling import TOP_TOKENS, Sampling, uniform


def test_uniform_numbers_are_uniform_and_a_function_of_their_arguments() -> None:
    numbers = np.array([uniform(0, f"key {i}", position) for i in range(200) for position in range(50)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # chi square, 19 degrees of freedom, p = 0.001
    assert uniform(0, "a", 1) == uniform(0, "a", 1)
    assert len({uniform(0, "a", 1), uniform(1, "a", 1), uniform(0, "b", 1), uniform(0, "a", 2)}) == 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = (logits / temperature).softmax(0).numpy()
    keys = [str(i) for i in range(20000)]
    drawn = Sampling(temperature, 1.0, 0).choose(logits.expand(len(keys), 4), keys, [0] * len(keys))
    assert np.abs(np.bincount(drawn, minlength=4) / len(keys) - expected).max() < 0.015


@pytest.mark.parametrize("vocabulary", [5, 3 * TOP_TOKENS])
def test_the_nucleus_is_the_fewest_likeliest_tokens_with_that_mass(vocabulary: int) -> None:
    probabilities = torch.full((vocabulary,), 0.4 / (vocabulary - 2))
    probabilities[[1, 3]] = torch.tensor([0.35, 0.25])
    keys = [str(i) for i in range(3000)]
    narrow = Sampling(1.0, 0.5, 0).choose(probabilities.log().expand(len(keys), -1), keys, [0] * len(keys))
    assert set(narrow) == {1, 3}
    assert abs(narrow.count(1) / len(keys) - 0.35 / 0.6) < 0.03
    wide = Sampling(1.0, 0.9, 0).choose(probabilities.log().expand(len(keys), -1), keys, [0] * len(keys))
    rest = vocabulary - 2
    assert len(set(wide)) == 2 + np.ceil(0.3 / 0.4 * rest - 1e-6)


def test_rounding_that_swaps_two_equally_likely_tokens_changes_no_draw() -> None:
    keys = [str(i) for i in range(500)]
    one, other = (torch.tensor([1.0, 1.0 + tiny, 0.0]).expand(len(keys), 3) for tiny in (1e-7, -1e-7))
    assert Sampling(1.0, 0.9, 0).choose(one, keys, [0] * 500) == Sampling(1.0, 0.9, 0).choose(
        other, keys, [0] * 500
    )


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_row_with_logits_that_are_not_finite_does_not_stop_other_rows(top_p: float) -> None:
    logits = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 9.0, 1.0], [float("inf"), 0.0, 0.0]])
    assert Sampling(0.2, top_p, 0).choose(logits, ["a", "b", "c"], [0, 0, 0]) == [0, 1, 0]


def test_zero_temperature_chooses_the_likeliest_token() -> None:
    assert Sampling(0.0, 0.95, 0).choose(
        torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), ["a", "b"], [0, 0]
    ) == [1, 0]
