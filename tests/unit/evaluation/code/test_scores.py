"""pass@k of contenders: values by hand, intervals that cover, and differences that are paired."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flora_train.evaluation.code.scores import Scores


def verdicts(adapter: str, language: str, **passed: list[int]) -> list[dict[str, Any]]:
    """One verdict for every sample of every problem: 1 passed, 0 failed an assertion."""
    words = ("AssertionError", "OK")
    return [
        {"adapter": adapter, "language": language, "name": name, "sample": i, "status": words[ok]}
        for name, samples in passed.items()
        for i, ok in enumerate(samples)
    ]


RECORDS = [
    *verdicts("a", "lua", p=[1, 0], q=[1, 1], r=[0, 0], s=[1, 0]),
    *verdicts("b", "lua", p=[0, 0], q=[1, 0], r=[0, 0], s=[0, 1]),
    *verdicts("a", "pl", p=[1, 1], q=[0, 0]),
    *verdicts("b", "pl", p=[0, 0], q=[0, 0]),
]


def test_values_are_those_computed_by_hand() -> None:
    scores = Scores(RECORDS)
    assert scores.pass_at(("a", "lua"), 1).value == pytest.approx((0.5 + 1 + 0 + 0.5) / 4)
    assert scores.pass_at(("a", "lua"), 2).value == pytest.approx(3 / 4)
    assert scores.difference("a", "b", language="lua", k=1).value == pytest.approx((0.5 + 0.5 + 0 + 0) / 4)
    assert scores.macro({"lua": "a", "pl": "a"}, 1).value == pytest.approx((0.5 + 0.5) / 2)
    assert scores.macro_difference(
        {"lua": "a", "pl": "a"}, {"lua": "b", "pl": "b"}, 1
    ).value == pytest.approx((0.25 + 0.5) / 2)
    assert scores.num_samples(("a", "lua")) == 2
    assert scores.ended["b", "pl"] == {"AssertionError": 4}


def test_pass_at_k_requires_k_samples() -> None:
    with pytest.raises(ValueError, match="pass@3 requires 1 <= k <= n"):
        Scores(RECORDS).pass_at(("a", "lua"), 3)


def test_a_difference_is_paired_so_that_equal_contenders_differ_by_no_more_than_four_problems_can_show() -> (
    None
):
    same = [*RECORDS, *({**record, "adapter": "twin"} for record in RECORDS if record["adapter"] == "a")]
    difference = Scores(same).difference("a", "twin", language="lua", k=1)
    bound = 1 - 0.025 ** (1 / 4)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.0, -bound, bound))
    assert not difference.excludes_zero


def test_a_difference_compares_only_what_both_have_tried() -> None:
    scores = Scores([*verdicts("a", "lua", p=[1], q=[0]), *verdicts("b", "lua", q=[0], r=[1])])
    assert scores.difference("a", "b", language="lua", k=1).value == 0.0
    assert scores.pass_at(("a", "lua"), 1).value == 0.5


@pytest.mark.parametrize(
    ("solved", "low", "high"), [(0, 0.0, 1 - 0.025 ** (1 / 20)), (1, 0.025 ** (1 / 20), 1.0)]
)
def test_the_interval_has_width_if_no_problem_of_twenty_is_solved(
    solved: int, low: float, high: float
) -> None:
    estimate = Scores(verdicts("a", "lua", **{f"p{i}": [solved] for i in range(20)})).pass_at(("a", "lua"), 1)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((solved, low, high))


def test_intervals_cover_the_truth_about_as_often_as_stated() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        chances = random.beta(1, 1, 60)
        records = verdicts(
            "a",
            "lua",
            **{f"p{i}": list(map(int, random.random(4) < chance)) for i, chance in enumerate(chances)},
        )
        estimate = Scores(records, resamples=400, seed=trial).pass_at(("a", "lua"), 1)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.90 <= covered / 200 <= 0.99
