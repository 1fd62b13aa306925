"""The guarantees of test_isolation.py on a base in bfloat16, which is the default on GPUs and on CPUs that
multiply it fast.

I2 and I3 hold to the bit there, too. Where float32 allows 1e-5, the tolerance here is that of a number with
eight bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import mixed_specs
from tests.unit.training.harness import make_trainer, only, plans_of, snapshot, train_together
from tests.unit.training.test_isolation import backward_only

DTYPE = torch.bfloat16


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant"])
def test_i1_gradient_in_bfloat16_is_that_of_the_adapters_own_examples(
    tmp_path: Path, checkpointing: str
) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path, dtype=DTYPE, checkpointing=checkpointing)
    plan = plans_of(trainer, 1)[0]
    backward_only(trainer, plan)
    together = {adapter: trainer.bank.gradient_row(adapter).clone() for adapter in plan.label_tokens}
    for adapter, gradient in together.items():
        part = only(plan, adapter)
        assert part is not None
        alone = make_trainer(
            [trainer.bank.specs[adapter]], tmp_path, dtype=DTYPE, checkpointing=checkpointing
        )
        alone.bank.row(0).copy_(trainer.bank.row(adapter))
        backward_only(alone, part)
        assert relative(gradient, alone.bank.gradient_row(0)) <= 2e-2


def test_trained_together_in_bfloat16_is_near_trained_alone(tmp_path: Path) -> None:
    together = make_trainer(mixed_specs(lr=2e-3), tmp_path, dtype=DTYPE, optimizer="sgd")
    begun = [together.bank.row(i).clone() for i in range(len(together.bank.specs))]
    plans = plans_of(together, 8)
    train_together(together, plans)
    for name, adapter in together.bank.ids.items():
        alone = make_trainer([together.bank.specs[adapter]], tmp_path, dtype=DTYPE, optimizer="sgd")
        for number, plan in enumerate(plans):
            part = only(plan, adapter)
            if part is not None:
                alone.step(number, part)
        way = together.bank.row(adapter) - begun[adapter]
        assert way.abs().max() > 0
        assert relative(alone.bank.row(0) - begun[adapter], way) <= 2e-2, name


def test_i2_absent_adapter_in_bfloat16_is_bit_identical(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs(weight_decay=0.1), tmp_path, dtype=DTYPE)
    absences = 0
    for number, plan in enumerate(plans_of(trainer, 6)):
        before = snapshot(trainer)
        trainer.step(number, plan)
        after = snapshot(trainer)
        for name, adapter in trainer.bank.ids.items():
            same = all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
            assert same == (adapter not in plan.label_tokens), (number, name)
            absences += same
    assert absences > 3


@pytest.mark.parametrize("victim", range(6))
@pytest.mark.quick("0", "3")
def test_i3_poisoned_adapter_in_bfloat16_changes_no_bit_of_the_others(tmp_path: Path, victim: int) -> None:
    healthy, poisoned = (make_trainer(mixed_specs(), tmp_path, dtype=DTYPE) for _ in range(2))
    plans = plans_of(healthy, 5)
    assert any(victim in plan.label_tokens for plan in plans[1:])
    for number, plan in enumerate(plans):
        if number == 1:
            poisoned.bank.row(victim).fill_(float("nan"))
        healthy.step(number, plan)
        poisoned.step(number, plan)
    expected, got = snapshot(healthy), snapshot(poisoned)
    for name, adapter in healthy.bank.ids.items():
        same = all(torch.equal(a, b) for a, b in zip(expected[name], got[name], strict=True))
        assert same == (adapter != victim), name


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_i4_gradients_in_bfloat16_under_checkpointing_equal_those_without(
    tmp_path: Path, checkpointing: str
) -> None:
    gradients = []
    for mode in ("off", checkpointing):
        trainer = make_trainer(mixed_specs(), tmp_path, checkpointing=mode, dtype=DTYPE)
        backward_only(trainer, plans_of(trainer, 1)[0])
        gradients.append([pool.gradients.clone() for pool in trainer.bank.pools])
    for plain, recomputed in zip(*gradients, strict=True):
        assert relative(recomputed, plain) <= 2e-2
