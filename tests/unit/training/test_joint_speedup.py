"""What separate runs would cost is measured on the run's own rows, and leaves the run as it was."""

from __future__ import annotations

from pathlib import Path

import torch

from flora_train.training.joint_speedup import time_joint_vs_separate
from tests.conftest import mixed_specs
from tests.unit.training.harness import make_trainer


def test_the_last_step_s_rows_are_timed_both_ways_and_nothing_changes(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path)
    trainer.train()
    plan = trainer.plan(trainer.at.done - 1)
    assert plan is not None
    before = {name: tensor.clone() for name, tensor in trainer.bank.tensors().items()}
    seen: list[list[int]] = []
    inner = trainer.bank.route
    trainer.bank.route = lambda ids, noise=None: (seen.append([int(i) for i in ids]), inner(ids, noise))[1]  # type: ignore[method-assign]
    found = time_joint_vs_separate(trainer)
    assert found is not None
    assert found["adapters"] == len(plan.label_tokens) > 1
    assert 0 < found["together"] < 60
    assert 0 < found["apart"] < 60
    n = len(plan.microbatches)
    joint, alone = seen[:n], seen[n:-n]
    assert seen[-n:] == joint
    rows = [row.adapter for batch in plan.microbatches for row in batch]
    assert sorted(i for ids in joint for i in ids) == sorted(i for ids in alone for i in ids) == sorted(rows)
    assert all(len(set(ids)) == 1 for ids in alone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.bank.tensors().items())
    assert not any(pool.gradients.any() for pool in trainer.bank.pools)


def test_one_adapter_has_nothing_to_be_apart_from(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs()[:1], tmp_path)
    trainer.train()
    assert time_joint_vs_separate(trainer) is None
