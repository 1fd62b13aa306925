"""The float64 reference of preference losses: known values, and derivatives against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tests.unit.training.preference_reference import (
    PairLosses,
    Vector,
    dpo,
    ipo,
    kl_of_draw,
    kto,
    log_one_minus_exp,
    odds_ratio,
    orpo_loss,
    sft,
)

GENERATOR = np.random.default_rng(26)
N = 12
TOKENS = GENERATOR.integers(1, 30, N).astype(np.float64)
OTHER_TOKENS = GENERATOR.integers(1, 30, N).astype(np.float64)
CHOSEN = -GENERATOR.uniform(0.1, 3.0, N) * TOKENS
REJECTED = -GENERATOR.uniform(0.1, 3.0, N) * OTHER_TOKENS
REFERENCE = CHOSEN + GENERATOR.normal(0, 4, N)
OTHER_REFERENCE = REJECTED + GENERATOR.normal(0, 4, N)
LABELS = GENERATOR.random(N) < 0.5

PAIRED: dict[str, Callable[[Vector, Vector], PairLosses]] = {
    "dpo": lambda c, r: dpo(c, r, REFERENCE, OTHER_REFERENCE, beta=0.3),
    "conservative dpo": lambda c, r: dpo(c, r, REFERENCE, OTHER_REFERENCE, beta=0.3, label_smoothing=0.2),
    "robust dpo": lambda c, r: dpo(
        c, r, REFERENCE, OTHER_REFERENCE, beta=0.3, label_smoothing=0.2, robust=True
    ),
    "ipo": lambda c, r: ipo(
        c, r, REFERENCE, OTHER_REFERENCE, chosen_tokens=TOKENS, rejected_tokens=OTHER_TOKENS, beta=0.1
    ),
    "orpo": lambda c, r: odds_ratio(c, r, chosen_tokens=TOKENS, rejected_tokens=OTHER_TOKENS, beta=0.4),
}


def slopes(function: Callable[[Vector], Vector], x: Vector) -> Vector:
    step = 1e-5
    return (function(x + step) - function(x - step)) / (2 * step)


@pytest.mark.parametrize("objective", PAIRED)
def test_derivatives_are_those_of_the_losses(objective: str) -> None:
    function = PAIRED[objective]
    result = function(CHOSEN, REJECTED)
    of_chosen = slopes(lambda c: function(c, REJECTED).losses, CHOSEN)
    of_rejected = slopes(lambda r: function(CHOSEN, r).losses, REJECTED)
    np.testing.assert_allclose(result.d_chosen, of_chosen, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(result.d_rejected, of_rejected, rtol=1e-6, atol=1e-9)
    assert (np.abs(result.d_chosen) > 0).all()


def test_derivative_of_kto() -> None:
    def losses(logps: Vector) -> Vector:
        return kto(
            logps, REFERENCE, LABELS, kl=0.7, beta=0.2, desirable_weight=1.5, undesirable_weight=0.5
        ).losses

    result = kto(CHOSEN, REFERENCE, LABELS, kl=0.7, beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    np.testing.assert_allclose(result.d_logp, slopes(losses, CHOSEN), rtol=1e-6, atol=1e-9)


def test_losses_where_policy_and_reference_agree() -> None:
    same = dpo(CHOSEN, REJECTED, CHOSEN, REJECTED, beta=0.1)
    np.testing.assert_allclose(same.losses, math.log(2))
    np.testing.assert_allclose(same.d_chosen, -0.05)
    squared = ipo(
        CHOSEN, REJECTED, CHOSEN, REJECTED, chosen_tokens=TOKENS, rejected_tokens=OTHER_TOKENS, beta=0.1
    )
    np.testing.assert_allclose(squared.losses, 25.0)
    rows = kto(CHOSEN, CHOSEN, LABELS, kl=0.0, beta=0.1, desirable_weight=2.0, undesirable_weight=1.0)
    np.testing.assert_allclose(rows.losses, np.where(LABELS, 1.0, 0.5))


def test_robust_form_is_unbiased_where_labels_are_flipped() -> None:
    # the mean over flipped and unflipped pairs, at the rate of flips, is the loss of the clean pairs
    rate = 0.2
    clean = dpo(CHOSEN, REJECTED, REFERENCE, OTHER_REFERENCE, beta=0.3)
    right = dpo(CHOSEN, REJECTED, REFERENCE, OTHER_REFERENCE, beta=0.3, label_smoothing=rate, robust=True)
    flipped = dpo(REJECTED, CHOSEN, OTHER_REFERENCE, REFERENCE, beta=0.3, label_smoothing=rate, robust=True)
    np.testing.assert_allclose((1 - rate) * right.losses + rate * flipped.losses, clean.losses)


def test_odds_ratio_by_hand() -> None:
    # one token each: probabilities 0.8 and 0.5, odds 4 and 1
    result = odds_ratio(
        np.log([0.8]), np.log([0.5]), chosen_tokens=np.ones(1), rejected_tokens=np.ones(1), beta=0.5
    )
    np.testing.assert_allclose(result.losses, 0.5 * math.log(1 + 1 / 4))


def test_orpo_adds_the_token_mean_of_prompt_and_completion() -> None:
    whole, tokens = np.array([-6.0, -12.0]), np.array([3.0, 6.0])
    pairs = odds_ratio(
        CHOSEN[:2], REJECTED[:2], chosen_tokens=TOKENS[:2], rejected_tokens=OTHER_TOKENS[:2], beta=0.1
    )
    loss = orpo_loss(
        CHOSEN[:2],
        REJECTED[:2],
        chosen_tokens=TOKENS[:2],
        rejected_tokens=OTHER_TOKENS[:2],
        whole_chosen=whole,
        whole_tokens=tokens,
        beta=0.1,
    )
    assert sft(whole, tokens) == (2.0, -1 / 9)
    assert loss == pytest.approx(2.0 + pairs.losses.mean())


def test_kl_is_clamped_after_the_mean() -> None:
    assert kl_of_draw(np.array([3.0, -1.0]), np.zeros(2)) == 1.0
    assert kl_of_draw(np.array([1.0, -3.0]), np.zeros(2)) == 0.0


def test_extreme_values_stay_finite() -> None:
    far = np.array([-1e4, -1e-9, -800.0])
    assert np.isfinite(log_one_minus_exp(far)).all()
    result = dpo(far, far[::-1], np.zeros(3), np.zeros(3), beta=1.0)
    assert np.isfinite(result.losses).all()
    assert np.isfinite(result.d_chosen).all()
