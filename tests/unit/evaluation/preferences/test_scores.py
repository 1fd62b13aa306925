"""Rewards of held-out preferences: by hand, with ties, paired by example, and where they are not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from flora_train.evaluation.preferences.score_types import Figure, PreferenceResult
from flora_train.evaluation.preferences.scores import ContenderNames, preference_result
from flora_train.evaluation.result_model import Interval
from flora_train.training.preference_heldout import HeldOutPreferences, Objective

Vector = NDArray[np.float64]
NAMES = {
    -1: ContenderNames("base", "base"),
    0: ContenderNames("task-flora", "flora"),
    1: ContenderNames("task-lora", "lora"),
}


def pairs(
    chosen: dict[int, Vector],
    rejected: dict[int, Vector],
    *,
    objective: Objective = "dpo",
    tokens: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    losses: dict[int, Vector] | None = None,
) -> HeldOutPreferences:
    n = len(chosen[-1])
    lengths = tokens or (np.full(n, 10), np.full(n, 10))
    with_reference = {} if objective == "orpo" else chosen
    return HeldOutPreferences(
        objective=objective,
        beta=0.5,
        chosen=chosen,
        rejected=rejected,
        reference_chosen=dict.fromkeys(with_reference, chosen[-1]),
        reference_rejected=dict.fromkeys(with_reference, rejected[-1]),
        losses=losses or dict.fromkeys(chosen, np.ones(n)),
        chosen_tokens=lengths[0],
        rejected_tokens=lengths[1],
    )


def rows(logps: dict[int, Vector], labels: NDArray[np.bool_]) -> HeldOutPreferences:
    return HeldOutPreferences(
        objective="kto",
        beta=0.5,
        chosen=logps,
        rejected={},
        reference_chosen=dict.fromkeys(logps, logps[-1]),
        reference_rejected={},
        losses=dict.fromkeys(logps, np.ones(len(labels))),
        chosen_tokens=np.full(len(labels), 10),
        rejected_tokens=np.zeros(0, np.int64),
        labels=labels,
    )


def result_of(heldout: HeldOutPreferences, samples: int = 400) -> PreferenceResult:
    return preference_result("task", heldout, NAMES, samples=samples, confidence=0.95, seed=3)


def value(result: PreferenceResult, family: str, figure: Figure) -> float | None:
    interval = result.by_family[family].figure(figure)
    assert interval is not None
    return interval.value


def test_reward_accuracy_and_margin_by_hand() -> None:
    base, other = np.array([-10.0, -20.0, -30.0, -8.0]), np.array([-12.0, -15.0, -30.0, -9.0])
    # rewards: +1 against -1, +1 against +2, a tie, and -1 against 0
    chosen = base + np.array([2.0, 2.0, 1.0, -2.0])
    rejected = other + np.array([-2.0, 4.0, 1.0, 0.0])
    result = result_of(pairs({-1: base, 0: chosen}, {-1: other, 0: rejected}))
    assert value(result, "flora", "reward_accuracy") == (1 + 0 + 0.5 + 0) / 4
    assert value(result, "flora", "reward_margin") == pytest.approx((2 - 1 + 0 - 1) / 4)
    # log-probabilities: -8 > -14, -18 < -11, a tie, -10 < -9
    assert value(result, "flora", "chosen_likelier") == 1.5 / 4
    assert value(result, "base", "chosen_likelier") == (1 + 0 + 0.5 + 1) / 4
    assert result.examples == 4
    assert result.desirable is None


def test_a_base_that_is_its_own_reference_has_ties_only() -> None:
    base, other = np.array([-10.0, -20.0]), np.array([-12.0, -15.0])
    result = result_of(pairs({-1: base, 0: base + 1}, {-1: other, 0: other}))
    assert result.base_is_reference
    assert value(result, "base", "reward_accuracy") == 0.5
    assert value(result, "base", "reward_margin") == 0
    difference = result.to_base["flora"].reward_accuracy
    assert (difference.value, difference.low, difference.high) == (0.5, 0.5, 0.5)


def test_rewards_of_orpo_are_log_probabilities_per_token() -> None:
    base, other = np.array([-10.0, -20.0]), np.array([-12.0, -15.0])
    tokens = np.array([10, 40]), np.array([10, 10])
    heldout = pairs({-1: base, 0: base}, {-1: other, 0: other}, objective="orpo", tokens=tokens)
    result = result_of(heldout)
    assert not result.base_is_reference
    assert value(result, "base", "reward_accuracy") == 1
    assert value(result, "base", "reward_margin") == pytest.approx(0.5 * (0.2 + 1.0) / 2)
    assert value(result, "base", "chosen_likelier") == 0.5
    assert value(result, "base", "chosen_likelier_per_token") == 1


def test_kto_by_hand() -> None:
    base, labels = np.array([-10.0, -20.0, -30.0, -8.0]), np.array([True, True, False, False])
    logps = base + np.array([2.0, 0.0, -4.0, 6.0])  # rewards 1, 0, -2, 3
    result = result_of(rows({-1: base, 0: logps}, labels))
    assert value(result, "flora", "reward_accuracy") == (1 + 0.5 + 1 + 0) / 4
    assert value(result, "flora", "reward_margin") == pytest.approx(0.5 - 0.5)
    assert result.by_family["flora"].chosen_likelier is None
    assert (result.examples, result.desirable) == (4, 2)


def test_kto_with_one_label_has_no_gap_but_an_accuracy() -> None:
    base = np.array([-10.0, -20.0, -30.0])
    result = result_of(rows({-1: base, 0: base + 1}, np.ones(3, np.bool_)))
    assert value(result, "flora", "reward_accuracy") == 1
    assert result.by_family["flora"].reward_margin == Interval(
        value=None, low=None, high=None, excludes_zero=False
    )


def test_resamples_of_one_label_do_not_spoil_the_interval_of_the_gap() -> None:
    base, labels = -np.arange(1.0, 7.0), np.array([True, False, False, False, False, False])
    gap = result_of(rows({-1: base, 0: np.where(labels, base + 2, base - 2)}, labels)).by_family["flora"]
    assert gap.reward_margin.finite == (2.0, 2.0, 2.0)


def test_differences_are_paired_by_example() -> None:
    generator = np.random.default_rng(0)
    base, other = generator.normal(-50, 20, 60), generator.normal(-50, 20, 60)
    noise = generator.normal(0, 30, 60)
    result = result_of(
        pairs({-1: base, 0: base + noise, 1: base + noise + 1}, {-1: other, 0: other, 1: other})
    )
    (between,) = [d for d in result.differences if d.second != "base"]
    assert (between.first, between.second) == ("flora", "lora")
    for bound in between.reward_margin.finite or ():
        assert bound == pytest.approx(-0.5)
    assert between.reward_margin.excludes_zero
    wide = result.to_base["flora"].reward_margin.finite
    assert wide is not None
    assert wide[2] - wide[1] > 1


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    generator = np.random.default_rng(1)
    base, other = generator.normal(-50, 20, 40), generator.normal(-50, 20, 40)
    chosen = base + generator.normal(1, 5, 40)
    interval = result_of(pairs({-1: base, 0: chosen}, {-1: other, 0: other}), samples=4000).by_family["flora"]
    margins = 0.5 * (chosen - base)
    means = [margins[generator.integers(0, 40, 40)].mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    finite = interval.reward_margin.finite
    assert finite is not None
    assert finite[1] == pytest.approx(low, abs=0.06)
    assert finite[2] == pytest.approx(high, abs=0.06)


def test_one_pair_has_no_clear_difference() -> None:
    base, other = np.array([-10.0]), np.array([-12.0])
    result = result_of(pairs({-1: base, 0: base + 5}, {-1: other, 0: other}))
    difference = result.to_base["flora"].reward_margin
    assert difference.value == 2.5
    assert not difference.excludes_zero


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_log_probabilities_that_are_not_finite_are_shown_as_such(bad: float) -> None:
    base, other = np.array([-10.0, -5.0, -7.0]), np.array([-12.0, -6.0, -7.0])
    broken, losses = base.copy(), np.array([0.7, bad, 0.7])
    broken[1] = bad
    result = result_of(
        pairs(
            {-1: base, 0: broken, 1: base + 1},
            {-1: other, 0: other, 1: other},
            losses={-1: np.ones(3), 0: losses, 1: np.ones(3)},
        )
    )
    assert value(result, "flora", "reward_margin") is None
    assert value(result, "flora", "loss") is None
    assert value(result, "lora", "reward_margin") == 0.5
    assert PreferenceResult.model_validate_json(result.model_dump_json()) == result
