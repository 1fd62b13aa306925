"""Learning-rate schedules: values at every step."""

from __future__ import annotations

from itertools import pairwise

import pytest

from flora_train.adapters.spec import AdapterSpec
from flora_train.training.optimizer import learning_rate
from tests.conftest import spec


def rates(ours: AdapterSpec, steps: int) -> list[float]:
    return [learning_rate(ours, step) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_linearly_from_a_first_step_that_moves(schedule: str) -> None:
    ours = spec("lora", lr=8.0, lr_schedule=schedule, warmup_steps=4, max_steps=12)
    assert rates(ours, 5) == pytest.approx([2.0, 4.0, 6.0, 8.0, 8.0])


def test_constant_schedule_is_constant() -> None:
    assert rates(spec("lora", lr=3.0, lr_schedule="constant", max_steps=5), 7) == [3.0] * 7


def test_linear_schedule_falls_to_zero_at_max_steps_and_stays_there() -> None:
    assert rates(spec("lora", lr=4.0, lr_schedule="linear", max_steps=4), 7) == pytest.approx(
        [4, 3, 2, 1, 0, 0, 0]
    )
    assert rates(spec("lora", lr=4.0, lr_schedule="linear", warmup_steps=2, max_steps=6), 7) == pytest.approx(
        [2, 4, 4, 3, 2, 1, 0]
    )


def test_cosine_schedule_is_half_a_cosine_to_zero() -> None:
    values = rates(spec("lora", lr=2.0, lr_schedule="cosine", max_steps=8), 10)
    assert values[0] == 2.0
    assert values[2] == pytest.approx(1 + 0.5**0.5)
    assert values[4] == pytest.approx(1.0)
    assert values[8:] == pytest.approx([0.0, 0.0])
    assert all(a > b for a, b in pairwise(values[:9]))


def test_every_step_that_an_adapter_takes_moves_it() -> None:
    for schedule in ("constant", "linear", "cosine"):
        for warmup in (0, 1, 6):
            assert (
                min(rates(spec("lora", lr=1.0, lr_schedule=schedule, warmup_steps=warmup, max_steps=7), 7))
                > 0
            )


def test_max_steps_default_to_the_run_s() -> None:
    assert spec("lora", steps=30).max_steps == 30
    assert spec("lora", steps=30, max_steps=9).max_steps == 9
