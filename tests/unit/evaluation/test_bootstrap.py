"""Bootstrap intervals cover the truth as often as stated, and differences are paired by example."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from flora_train.evaluation.bootstrap import MAX_PAIRED, Comparison, compare, compared_pairs
from flora_train.training.heldout import HeldOut

LN2 = math.log(2)


def held_out(nats: dict[int, NDArray[np.float64]], label_bytes: NDArray[np.int64] | None = None) -> HeldOut:
    n = len(next(iter(nats.values())))
    sizes = np.full(n, 10) if label_bytes is None else label_bytes
    return HeldOut("task", nats, label_tokens=sizes // 2, label_bytes=sizes)


def judge(heldout: HeldOut, confidence: float = 0.95, seed: int = 0) -> Comparison:
    return compare(heldout, samples=1000, confidence=confidence, seed=seed)


def losses(n: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).gamma(4.0, 2.0, n)


def test_interval_of_one_example_is_its_value_and_excludes_nothing() -> None:
    heldout = HeldOut("a", {0: np.array([3.0]), -1: np.array([5.0])}, np.array([4]), np.array([10]))
    difference = compare(heldout, samples=100, confidence=0.95, seed=0).differences[0, -1]
    assert difference.value < 0
    assert difference.low == difference.high == difference.value
    assert not difference.excludes_zero
    assert not difference.interval().excludes_zero


def test_identical_contenders_differ_by_exactly_zero() -> None:
    result = judge(held_out({-1: losses(40), 0: losses(40)}))
    for pair in ((-1, 0), (0, -1)):
        estimate = result.differences[pair]
        assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
        assert not estimate.excludes_zero
    assert result.contenders[0] == result.contenders[-1]


def test_a_constant_shift_is_found_exactly_because_the_examples_are_paired() -> None:
    base = losses(40)
    result = judge(held_out({-1: base, 0: base - 1.0}))
    difference = result.differences[0, -1]
    for figure in (difference.value, difference.low, difference.high):
        assert figure == pytest.approx(-0.1 / LN2)
    assert difference.excludes_zero
    assert result.contenders[0].high > result.contenders[-1].low  # unpaired intervals overlap


def test_interval_covers_a_known_shift_about_as_often_as_it_promises() -> None:
    covered, runs = 0, 200
    for seed in range(runs):
        random = np.random.default_rng(seed)
        base = random.gamma(4.0, 2.0, 60)
        estimate = compare(
            held_out({-1: base, 0: base - random.normal(1.0, 2.0, 60)}),
            samples=300,
            confidence=0.9,
            seed=seed,
        ).differences[0, -1]
        covered += estimate.low <= -0.1 / LN2 <= estimate.high
    assert 0.84 * runs <= covered <= 0.96 * runs


def test_interval_shrinks_with_the_root_of_the_number_of_examples() -> None:
    widths = []
    for n in (50, 200, 800):
        random = np.random.default_rng(1)
        base = random.gamma(4.0, 2.0, n)
        estimate = judge(held_out({-1: base, 0: base - random.normal(1.0, 2.0, n)})).differences[0, -1]
        widths.append(estimate.high - estimate.low)
    assert widths[0] / widths[1] == pytest.approx(2.0, rel=0.3)
    assert widths[1] / widths[2] == pytest.approx(2.0, rel=0.3)


def test_interval_grows_with_confidence() -> None:
    random = np.random.default_rng(0)
    heldout = held_out({-1: losses(50), 0: losses(50) + random.normal(0, 1, 50)})
    inner, outer = judge(heldout, 0.6).differences[0, -1], judge(heldout, 0.99).differences[0, -1]
    assert outer.low < inner.low < inner.value < inner.high < outer.high


def test_figures_are_bits_per_byte_weighted_by_bytes() -> None:
    """A ratio of sums: a long example counts by its bytes, not as one."""
    nats = {-1: np.array([8.0, 100.0]), 0: np.array([4.0, 50.0])}
    heldout = held_out(nats, np.array([4, 96]))
    assert heldout.bits_per_byte(-1) == pytest.approx(108 / 100 / LN2)
    assert heldout.loss(-1) == pytest.approx(108 / 50)
    assert heldout.loss(-1, first=1) == pytest.approx(8 / 2)
    result = judge(heldout)
    assert result.contenders[-1].value == pytest.approx(108 / 100 / LN2)
    assert result.differences[0, -1].value == pytest.approx(-54 / 100 / LN2)
    assert result.contenders[-1].high == pytest.approx(
        max(2.0, 100 / 96) / LN2
    )  # all draws the first example


def test_differences_are_antisymmetric_and_same_seed_gives_same_figures() -> None:
    heldout = held_out({-1: losses(30), 0: losses(30, 1), 1: losses(30, 2)})
    result = judge(heldout)
    assert set(result.differences) == {(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a != b}
    there, back = result.differences[0, 1], result.differences[1, 0]
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert judge(heldout) == result
    assert judge(heldout, seed=1) != result


def test_loss_that_is_not_a_number_spoils_its_contender_only() -> None:
    spoilt = losses(30)
    spoilt[3] = math.nan
    clean = {-1: losses(30), 0: losses(30, 1)}
    result = judge(held_out({**clean, 1: spoilt}))
    assert result.differences[0, -1] == judge(held_out(clean)).differences[0, -1]
    assert math.isnan(result.contenders[1].value)
    assert math.isnan(result.differences[1, -1].low)
    assert not result.differences[1, -1].excludes_zero


@pytest.mark.filterwarnings("error")
def test_losses_that_are_not_finite_warn_of_nothing() -> None:
    result = judge(
        held_out(
            {-1: losses(30), 0: np.full(30, math.inf), 1: np.full(30, math.nan), 2: np.full(30, math.inf)}
        )
    )
    assert math.isnan(result.differences[0, 2].value)
    assert not any(result.differences[a, -1].excludes_zero for a in (0, 1, 2))


def test_sweep_of_thousands_is_compared_in_linear_time() -> None:
    random = np.random.default_rng(0)
    nats = {i: random.normal(100, 1, 20) for i in range(-1, 3000)}
    started = time.process_time()
    found = compare(held_out(nats), samples=200, confidence=0.95, seed=0)
    assert all(found.differences[a, -1].value for a in range(0, 3000, 100))
    assert len(found.differences) == 3001 * 3000
    assert time.process_time() - started < 10  # each with each: a quarter of an hour


def test_resamples_do_not_depend_on_how_many_are_in_memory_at_one_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heldout = held_out({-1: np.arange(1.0, 61), 0: np.arange(2.0, 62)})
    whole = compare(heldout, samples=300, confidence=0.9, seed=1)
    monkeypatch.setattr("flora_train.evaluation.bootstrap.MAX_WEIGHTS", 700)
    parts = compare(heldout, samples=300, confidence=0.9, seed=1)
    assert parts.contenders[0].low == pytest.approx(whole.contenders[0].low, rel=1e-12)
    assert parts.differences[0, -1].high == pytest.approx(whole.differences[0, -1].high, rel=1e-12)


def test_compared_pairs_are_all_of_a_few_and_linear_in_many() -> None:
    few = list(range(MAX_PAIRED))
    assert len(compared_pairs(few, 3)) == MAX_PAIRED * (MAX_PAIRED - 1) // 2
    many = list(range(MAX_PAIRED + 1))
    pairs = compared_pairs(many, 3)
    assert len(pairs) == MAX_PAIRED
    assert all(a < b and 3 in (a, b) for a, b in pairs)
    assert compared_pairs(many, None) == []
