"""What separate runs would cost is measured on the run's own rows, and leaves the run as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.config.training_schema import TrainingConfig
from flora_train.training.joint_speedup import time_joint_vs_separate
from tests.conftest import mixed_specs
from tests.unit.training.harness import make_trainer


def test_the_last_step_s_rows_are_timed_both_ways_and_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path, compare_separate=True)
    trainer.train()
    plan = trainer.plan(trainer.state.step - 1)
    assert plan is not None
    before = {name: tensor.clone() for name, tensor in trainer.bank.tensors().items()}
    seen: list[list[int]] = []
    inner = trainer.bank.route

    def route(ids: torch.Tensor, *details: Any, **named: Any) -> None:
        seen.append([int(i) for i in ids])
        inner(ids, *details, **named)

    monkeypatch.setattr(trainer.bank, "route", route)
    found = time_joint_vs_separate(trainer)
    assert found is not None
    assert found.measured == found.adapters == len(plan.label_tokens) > 1
    assert 0 < found.joint_seconds < 60
    assert 0 < found.separate_seconds < 60
    n = len(plan.microbatches)
    joint, alone = seen[:n], seen[n:-n]
    assert seen[-n:] == joint
    rows = [row.adapter for batch in plan.microbatches for row in batch]
    assert sorted(i for ids in joint for i in ids) == sorted(i for ids in alone for i in ids) == sorted(rows)
    assert all(len(set(ids)) == 1 for ids in alone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.bank.tensors().items())
    assert not any(pool.gradients.any() for pool in trainer.bank.pools)


def test_joint_speedup_of_one_adapter_is_not_measured(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs()[:1], tmp_path, compare_separate=True)
    trainer.train()
    assert time_joint_vs_separate(trainer) is None


def test_joint_speedup_is_measured_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path)
    trainer.train()
    monkeypatch.setattr(trainer, "plan", lambda number: pytest.fail("a step was planned"))
    assert time_joint_vs_separate(trainer) is None


def test_a_limit_that_is_too_short_for_all_adapters_gives_an_estimate_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes on by one second for every row of a pass."""
    trainer = make_trainer(mixed_specs(), tmp_path, compare_separate=True, compare_separate_seconds=1e6)
    trainer.train()
    trainer.state.seconds, inner, clock = 0.0, trainer.bank.route, [0.0]

    def route(ids: torch.Tensor, *details: Any, **named: Any) -> None:
        clock[0] += len(ids)
        inner(ids, *details, **named)

    monkeypatch.setattr(trainer.bank, "route", route)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    whole = time_joint_vs_separate(trainer)
    assert whole is not None
    rows, estimates = whole.joint_seconds, []
    assert (whole.separate_seconds, whole.measured) == (rows, whole.adapters)
    for limit in (2.9 * rows, 2.5 * rows, 2.2 * rows):
        begun = clock[0]
        config = trainer.config.training.model_copy(update={"compare_separate_seconds": limit})
        trainer.config = trainer.config.model_copy(update={"training": config})
        estimate = time_joint_vs_separate(trainer)
        assert clock[0] - begun <= limit
        assert estimate is None or 2 <= estimate.measured < estimate.adapters
        assert estimate is None or estimate.separate_seconds == pytest.approx(rows, rel=0.6)
        estimates.append(estimate)
    assert any(estimates)


def test_a_limit_below_a_single_step_measures_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path, compare_separate=True, compare_separate_seconds=1e-6)
    trainer.train()
    assert time_joint_vs_separate(trainer) is None
    assert "training.compare_separate_seconds is too short" in caplog.text


def test_the_limit_is_refused_where_nothing_is_compared() -> None:
    with pytest.raises(ValueError, match=r"requires training\.compare_separate=true"):
        TrainingConfig(steps=1, compare_separate_seconds=20)
