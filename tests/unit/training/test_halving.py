"""Successive halving: the settings with the lower losses remain; the winner learns as it would alone."""

from __future__ import annotations

from math import nan
from pathlib import Path

import pytest

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.sweep import SweepConfig
from flora_train.training.early_stopping import SuccessiveHalving
from flora_train.training.trainer import Trainer
from tests.conftest import spec
from tests.unit.training.harness import make_trainer


def members(task: str, count: int, sweep: str | None = "x") -> list[AdapterSpec]:
    return [spec("lora", task, f"x{i}", sweep=sweep) for i in range(count)]


def halving(**options: object) -> SweepConfig:
    return SweepConfig(strategy="halving", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "options", "steps", "rungs"),
    [
        (4, {}, 100, [25, 50]),
        (12, {}, 160, [10, 20, 40, 80]),
        (9, {"factor": 3}, 90, [10, 30]),
        (2, {}, 100, [50]),
        (1, {}, 100, []),
        (8, {}, 4, [1, 2]),
        (4, {"rungs": [7]}, 100, [7]),
    ],
)
def test_rungs_suffice_until_one_is_left(
    count: int, options: dict[str, object], steps: int, rungs: list[int]
) -> None:
    assert SuccessiveHalving(members("a", count), halving(**options), steps).rungs == rungs


def test_halving_has_no_rungs_without_a_sweep_or_with_strategy_all() -> None:
    assert SuccessiveHalving(members("a", 4, sweep=None), halving(), 100).rungs == []
    assert SuccessiveHalving(members("a", 4), SweepConfig(), 100).rungs == []


def test_halving_retires_the_higher_losses_of_each_task() -> None:
    judge = SuccessiveHalving(
        [*members("a", 4), *members("b", 3), spec("lora", "a", "alone")], halving(), 100
    )
    losses = dict(enumerate([3.0, 1.0, nan, 2.0, 2.0, 2.0, 1.0, 9.0]))  # two rungs for three as for four
    assert judge.eliminated(losses, 24, ()) == []
    assert judge.eliminated(losses, 25, ()) == [0, 2, 5]  # a NaN is the highest; of equals the first stays
    assert judge.eliminated(losses, 50, {0, 2, 5}) == [3, 4]
    assert judge.eliminated(losses, 50, {0, 1, 2, 5}) == [4]  # who stopped by itself takes nobody along


def test_a_smaller_sweep_is_halved_at_the_last_rungs() -> None:
    judge = SuccessiveHalving([*members("a", 4), *members("b", 2)], halving(), 100)
    losses = dict(enumerate([4.0, 3.0, 2.0, 1.0, 2.0, 1.0]))
    assert judge.eliminated(losses, 25, ()) == [0, 1]
    assert judge.eliminated(losses, 50, {0, 1}) == [2, 4]


def trainer(folder: Path, strategy: str = "halving") -> Trainer:
    folder.mkdir()
    specs = [
        spec("lora", task, f"x_lr{i}", lr=lr, sweep="x")
        for task in "ab"
        for i, lr in enumerate((1e-4, 3e-3, 1.0, 3.0))
    ]
    return make_trainer(specs, folder, steps=16, sweep=strategy)


def test_remaining_adapters_share_the_budget_of_retired_ones(tmp_path: Path) -> None:
    one, whole = trainer(tmp_path / "one"), trainer(tmp_path / "whole", "all")
    one.train()
    whole.train()
    stopped = one.early_stopping.retired
    assert sorted(one.early_stopping.first_absent_steps.values()) == [4, 4, 4, 4, 8, 8]
    for first in (0, 4):  # one of each task is left
        assert len([a for a in range(first, first + 4) if a not in stopped]) == 1
    steps = one.optimizer.steps
    for left in set(range(8)) - stopped.keys():
        assert steps[left] >= max(steps[a] for a in stopped)
    after = [one.plan(number) for number in range(8, 16)]
    before = [whole.plan(number) for number in range(8, 16)]
    draws = [
        len({(row.task, row.example) for group in plan.microbatches for row in group})
        for plan in after
        if plan
    ]
    assert sum(draws) > 2 * sum(
        len({(r.task, r.example) for g in plan.microbatches for r in g}) for plan in before if plan
    )
    assert whole.early_stopping.retired == {}


def test_seeds_of_a_setting_stay_or_leave_together() -> None:
    """By their mean: the best single seed is of the setting that leaves."""
    specs = [
        spec("lora", "a", f"x{i}_seed{seed}", sweep="x", seed=seed, seeds_of=f"x{i}")
        for i in range(2)
        for seed in range(2)
    ]
    judge = SuccessiveHalving(specs, halving(), 100)
    assert judge.rungs == [50]  # of two settings
    assert judge.eliminated(dict(enumerate([1.0, 9.0, 3.0, 4.0])), 50, ()) == [0, 1]
    assert judge.eliminated(dict(enumerate([1.0, 2.0, 3.0, nan])), 50, ()) == [2, 3]
    assert judge.eliminated(dict(enumerate([1.0, 9.0, 3.0, 4.0])), 50, {1}) == [2, 3]
