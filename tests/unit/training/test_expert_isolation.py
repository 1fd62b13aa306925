"""Adapters on fused experts, whose tokens meet in the base's experts, train together as they train alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.spec import AdapterSpec
from tests.architectures import MIXTURES
from tests.conftest import spec
from tests.unit.training.harness import (
    check_isolation,
    make_trainer,
    plans_of,
    snapshot,
    train_together,
)

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
LEARNING_RATES = {"adamw": 2e-3, "sgd": 0.3}


def expert_specs(**options: Any) -> list[AdapterSpec]:
    """Every method on experts, alone and beside attention, and an adapter that has attention alone."""
    alone = {"target_modules": [], "target_parameters": BOTH, **options}
    return [
        spec("flora", "a", "flora", rank=2, variant="residual", **alone),
        spec("lora", "a", "lora", rank=2, **{**alone, "target_modules": ["q_proj", "v_proj"]}),
        spec("flora", "b", "pure", rank=2, variant="pure", **alone),
        spec("ia3", "c", "ia3", **alone),
        spec("lora", "b", "down", rank=2, **{**alone, "target_parameters": BOTH[1:]}),
        spec("lora", "c", "attention", rank=2, target_modules=["q_proj"], **options),
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.quick(
    "mixtral-off-adamw",
    "qwen3_moe-reentrant-sgd",
    "olmoe-non_reentrant-adamw",
    "gpt_oss-off-sgd",
)
def test_adapters_on_experts_trained_together_equal_those_trained_alone(
    tmp_path: Path, architecture: str, checkpointing: str, optimizer: str
) -> None:
    specs = expert_specs(lr=LEARNING_RATES[optimizer], weight_decay=0.01)
    plans = check_isolation(
        specs, tmp_path, architecture=architecture, checkpointing=checkpointing, optimizer=optimizer
    )
    assert len(plans) == 20


def test_absent_adapters_on_experts_stay_bit_identical(tmp_path: Path) -> None:
    trainer = make_trainer(expert_specs(), tmp_path, "mixtral")
    absences = 0
    for number, plan in enumerate(plans_of(trainer, 8)):
        before = snapshot(trainer)
        trainer.step(number, plan)
        after = snapshot(trainer)
        for name, adapter in trainer.bank.ids.items():
            same = all(torch.equal(one, other) for one, other in zip(before[name], after[name], strict=True))
            assert same == (adapter not in plan.label_tokens)
            absences += same
    assert absences


def test_a_nan_in_an_adapter_on_experts_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    """Its tokens may go to other experts than before, so that the sums of others have other shapes: they are
    equal to rounding."""
    specs = expert_specs(lr=2e-3)
    clean, broken = (make_trainer(specs, tmp_path, "mixtral") for _ in range(2))
    broken.bank.row(0).fill_(float("nan"))
    for trainer in (clean, broken):
        train_together(trainer, plans_of(trainer, 6))
    assert not broken.bank.row(0).isfinite().any()
    for name, adapter in broken.bank.ids.items():
        if adapter:
            torch.testing.assert_close(
                broken.bank.row(adapter), clean.bank.row(adapter), rtol=0, atol=1e-5, msg=name
            )
