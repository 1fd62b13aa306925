"""Losses of preferences and every derivative of them, against the independent float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora_train.config.preference_schema import Objective
from flora_train.data.preferences.preference import Preference
from flora_train.training.preference_loss import (
    Completions,
    PairScores,
    kl_estimate,
    labelled_losses,
    pair_losses,
)
from tests.unit.training import preference_reference as reference
from tests.unit.training.preference_reference import PairLosses, Vector

N = 40
GENERATOR = np.random.default_rng(7)
TOKENS = GENERATOR.integers(1, 60, N).astype(np.float64)
OTHER_TOKENS = GENERATOR.integers(1, 60, N).astype(np.float64)
CHOSEN = -GENERATOR.uniform(0.02, 4.0, N) * TOKENS
REJECTED = -GENERATOR.uniform(0.02, 4.0, N) * OTHER_TOKENS
REFERENCE = CHOSEN + GENERATOR.normal(0, 6, N)
OTHER_REFERENCE = REJECTED + GENERATOR.normal(0, 6, N)
LABELS = GENERATOR.random(N) < 0.5
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


def leaf(values: Vector) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def of_pairs(preference: Preference) -> tuple[PairScores, Vector, Vector]:
    """Scores of all pairs, and the derivative of each loss by the pair's two log-probabilities."""
    chosen, rejected = leaf(CHOSEN), leaf(REJECTED)
    references: tuple[Tensor | None, Tensor | None] = (None, None)
    if preference.has_reference:
        references = torch.tensor(REFERENCE), torch.tensor(OTHER_REFERENCE)
    scores = pair_losses(
        preference,
        Completions(chosen, references[0], torch.tensor(TOKENS)),
        Completions(rejected, references[1], torch.tensor(OTHER_TOKENS)),
    )
    scores.losses.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    return scores, chosen.grad.numpy(), rejected.grad.numpy()


def expected_of(preference: Preference) -> PairLosses:
    beta, both = preference.beta, (CHOSEN, REJECTED, REFERENCE, OTHER_REFERENCE)
    tokens = {"chosen_tokens": TOKENS, "rejected_tokens": OTHER_TOKENS}
    if preference.objective == "dpo":
        return reference.dpo(*both, beta=beta, label_smoothing=preference.label_smoothing)
    if preference.objective == "ipo":
        return reference.ipo(*both, beta=beta, **tokens)
    return reference.odds_ratio(CHOSEN, REJECTED, beta=beta, **tokens)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(
    ("objective", "smoothing"), [("dpo", 0.0), ("dpo", 0.1), ("dpo", 0.45), ("ipo", 0.0), ("orpo", 0.0)]
)
def test_losses_and_derivatives_of_pairs(objective: Objective, smoothing: float, beta: float) -> None:
    preference = Preference(objective, beta=beta, label_smoothing=smoothing)
    scores, d_chosen, d_rejected = of_pairs(preference)
    expected = expected_of(preference)
    np.testing.assert_allclose(scores.losses.detach().numpy(), expected.losses, **TOLERANCE)
    np.testing.assert_allclose(d_chosen, expected.d_chosen, **TOLERANCE)
    np.testing.assert_allclose(d_rejected, expected.d_rejected, **TOLERANCE)


@pytest.mark.parametrize(("objective", "divided"), [("dpo", False), ("ipo", False), ("orpo", True)])
def test_rewards_of_pairs(objective: Objective, divided: bool) -> None:
    scores, _, _ = of_pairs(Preference(objective, beta=0.3))
    chosen, rejected = 0.3 * (CHOSEN - REFERENCE), 0.3 * (REJECTED - OTHER_REFERENCE)
    if divided:
        chosen, rejected = 0.3 * CHOSEN / TOKENS, 0.3 * REJECTED / OTHER_TOKENS
    np.testing.assert_allclose(scores.chosen_rewards.detach().numpy(), chosen, **TOLERANCE)
    np.testing.assert_allclose(scores.rejected_rewards.detach().numpy(), rejected, **TOLERANCE)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.25)])
@pytest.mark.parametrize("kl", [0.0, 0.8])
def test_losses_and_derivatives_of_labelled_completions(kl: float, weights: tuple[float, float]) -> None:
    preference = Preference("kto", beta=0.2, desirable_weight=weights[0], undesirable_weight=weights[1])
    logps = leaf(CHOSEN)
    scores = labelled_losses(
        preference,
        Completions(logps, torch.tensor(REFERENCE), torch.tensor(TOKENS)),
        torch.tensor(LABELS),
        torch.tensor([kl], dtype=torch.float64),
    )
    scores.losses.sum().backward()
    assert logps.grad is not None
    expected = reference.kto(
        CHOSEN,
        REFERENCE,
        LABELS,
        kl=kl,
        beta=0.2,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    np.testing.assert_allclose(scores.losses.detach().numpy(), expected.losses, **TOLERANCE)
    np.testing.assert_allclose(logps.grad.numpy(), expected.d_logp, **TOLERANCE)
    np.testing.assert_allclose(scores.rewards.detach().numpy(), 0.2 * (CHOSEN - REFERENCE), **TOLERANCE)


@pytest.mark.parametrize("ratios", [[3.0, -1.0, 0.5], [-3.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
def test_the_kl_term_is_a_constant_that_is_clamped_after_the_mean(ratios: list[float]) -> None:
    values = leaf(np.array(ratios))
    estimate = kl_estimate(values)
    assert float(estimate) == pytest.approx(reference.kl_of_draw(np.array(ratios), np.zeros(3)))
    assert not estimate.requires_grad


@pytest.mark.parametrize("objective", ["dpo", "ipo", "orpo"])
def test_extreme_log_probabilities_keep_losses_and_derivatives_finite(objective: Objective) -> None:
    far: NDArray[np.float64] = np.array([-1e-6, -1e-3, -1.0, -1e3, -1e4])
    chosen, rejected, tokens = leaf(far), leaf(far[::-1].copy()), torch.ones(5, dtype=torch.float64)
    zeros = torch.zeros(5, dtype=torch.float64)
    scores = pair_losses(
        Preference(objective, beta=0.1),
        Completions(chosen, zeros, tokens),
        Completions(rejected, zeros, tokens),
    )
    scores.losses.sum().backward()
    assert scores.losses.isfinite().all()
    for values in (chosen, rejected):
        assert values.grad is not None
        assert values.grad.isfinite().all()
