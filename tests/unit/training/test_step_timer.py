"""Shares of a step's time add up, and measuring the base changes no result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flora_train.training.step_timer import PARTS, StepTimer, format_shares
from tests.conftest import mixed_specs
from tests.unit.training.harness import make_trainer, plans_of


class SlowClock(StepTimer):
    """Time passes by hand."""

    at = 0.0

    def now(self) -> float:
        return self.at


def test_shares_are_of_the_timed_steps_and_add_up() -> None:
    clock = SlowClock(torch.device("cpu"), 5)
    assert clock.shares() == {}
    clock.base_rate = 0.02
    with clock.part("loss"):  # of an evaluation
        clock.at += 100
    for number in range(2):
        with clock.step(number):
            with clock.part("data"):
                clock.at += 1
            clock.count_tokens(100)
            clock.at += 5  # the model
            with clock.part("loss"):
                clock.at += 3
            with clock.part("optimizer"):
                clock.at += 1
    assert clock.shares() == pytest.approx(
        {"base": 0.2, "adapters": 0.3, "loss": 0.3, "optimizer": 0.1, "data": 0.1}
    )
    assert format_shares(clock.shares()) == "base 20 %, adapters 30 %, loss 30 %, optimizer 10 %, data 10 %"


def test_measuring_the_base_between_two_steps_keeps_what_the_first_took() -> None:
    clock = SlowClock(torch.device("cpu"), 5)
    with clock.step(0):
        clock.count_tokens(10)
        clock.at += 5

    def base_pass() -> None:
        clock.at += 2
        with clock.part("loss"):
            clock.at += 1

    clock.time_base(base_pass, 10)
    assert clock.base_rate == pytest.approx(0.2)
    assert dict(clock.seconds) == {"step": 5}
    shares = {name: share for name, share in clock.shares().items() if share}
    assert shares == pytest.approx({"base": 0.4, "adapters": 0.6})


def test_on_a_gpu_only_some_steps_are_timed() -> None:
    clock = SlowClock(torch.device("cuda"), 3)
    for number in range(7):
        with clock.step(number):
            clock.at += 1
    assert clock.seconds["step"] == 3


@pytest.mark.parametrize("checkpointing", ["off", "reentrant"])
def test_measuring_the_base_changes_nothing_of_the_run(tmp_path: Path, checkpointing: str) -> None:
    measured, plain = (make_trainer(mixed_specs(), tmp_path, checkpointing=checkpointing) for _ in range(2))
    plans = plans_of(plain, 4)
    for number, plan in enumerate(plans):
        measured.time_base(plan)
        assert not any(pool.gradients.any() for pool in measured.bank.pools)
        measured.step(number, plan)
        plain.step(number, plan)
    for ours, theirs in zip(measured.bank.pools, plain.bank.pools, strict=True):
        assert torch.equal(ours.values, theirs.values)
    assert measured.timer.base_rate
    shares = measured.timer.shares()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares.keys() <= set(PARTS)
    assert plain.timer.shares() == {}
