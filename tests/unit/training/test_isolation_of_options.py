"""Adapters with LoRA+, NEFTune noise, averages and seeds learn together as each alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.spec import AdapterSpec
from flora_train.training.optimizer import AVERAGE
from flora_train.training.trainer import Trainer
from tests.conftest import mixed_specs
from tests.unit.training.harness import (
    largest_difference_to_training_alone,
    make_trainer,
    moved,
    only,
    plans_of,
    train_together,
)
from tests.unit.training.test_preferences import BUDGET, MIXED


def specs(**options: Any) -> list[AdapterSpec]:
    """Every option on adapters of every method that has it, beside adapters without."""
    changes: dict[str, dict[str, Any]] = {
        "a-flora": {"lr_ratio": 4.0, "neftune_noise_alpha": 5.0},
        "b-flora_one": {"ema_decay": 0.9, "neftune_noise_alpha": 5.0, "seed": 7},
        "a-lora": {"lr_ratio": 8.0, "ema_decay": 0.8, "neftune_noise_alpha": 10.0, "dropout": 0.2, "seed": 3},
        "c-dora": {"lr_ratio": 2.0, "neftune_noise_alpha": 3.0},
        "a-ia3": {"ema_decay": 0.5, "neftune_noise_alpha": 5.0},
    }
    return [replace(s, **changes.get(s.name, {})) for s in mixed_specs(**options)]


def averages(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Adapter -> its average, of adapters that have one."""
    found = {}
    for i, s in enumerate(trainer.bank.specs):
        if s.ema_decay is not None:
            found[s.name] = trainer.bank.state(i)[AVERAGE]
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tokens_per_microbatch": 32}, id="accumulation"),
        pytest.param({"checkpointing": "reentrant"}, id="reentrant-checkpointing"),
        pytest.param(
            {"checkpointing": "non_reentrant", "tokens_per_microbatch": 32},
            id="checkpointing-and-accumulation",
        ),
    ],
)
@pytest.mark.quick("plain-adamw", "accumulation-sgd", "reentrant-checkpointing-sgd")
def test_trained_together_equals_trained_alone(
    tmp_path: Path, optimizer: str, options: dict[str, Any]
) -> None:
    lr = {"adamw": 1e-3, "sgd": 0.1}[optimizer]
    options = {"optimizer": optimizer, **options}
    together = make_trainer(specs(lr=lr, weight_decay=0.1), tmp_path, **options)
    plans = plans_of(together)
    assert any(len(plan.label_tokens) < 7 for plan in plans)
    train_together(together, plans)
    assert min(moved(together).values()) > 1e-3
    averages_together = averages(together)
    assert len(averages_together) == 3
    for name, adapter in together.bank.ids.items():
        alone = make_trainer([together.bank.specs[adapter]], tmp_path, **options)
        for number, plan in enumerate(plans):
            part = only(plan, adapter)
            if part is not None:
                alone.step(number, part)
        assert (alone.bank.row(0) - together.bank.row(adapter)).abs().max() <= 1e-5, name
        for average in averages(alone).values():
            assert (average - averages_together[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.quick("adamw")
def test_packed_chats_and_preferences_trained_together_equal_those_trained_alone(
    tmp_path: Path, optimizer: str
) -> None:
    """With noise and dropout on packed conversations, DPO pairs and KTO rows, and references without."""
    options = {"preferences": MIXED, "packed_chats": ["a"], **BUDGET, "optimizer": optimizer}
    lr = {"adamw": 1e-3, "sgd": 1.0}[optimizer]
    together = make_trainer(specs(lr=lr), tmp_path, **options)
    plans = plans_of(together)
    rows = [row for plan in plans for rows in plan.microbatches for row in rows]
    packed = [together.noise(0, row) for row in rows if row.task == "a"]
    assert any(len(noise.documents) > 1 for noise in packed)
    assert any(row.frozen for row in rows)
    train_together(together, plans)
    differences = largest_difference_to_training_alone(together, plans, tmp_path, **options)
    assert max(differences.values()) <= 1e-5, differences
    assert min(moved(together).values()) > 1e-3


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_recomputed_forward_sees_the_same_noise(checkpointing: str, tmp_path: Path) -> None:
    rows = []
    for mode in ("off", checkpointing):
        trainer = make_trainer(specs(lr=1e-2), tmp_path, checkpointing=mode, optimizer="sgd")
        train_together(trainer, plans_of(trainer, 4))
        rows.append([trainer.bank.row(i).clone() for i in range(7)])
    for ours, theirs in zip(*rows, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_noise_changes_its_adapter_and_no_bit_of_the_others(tmp_path: Path) -> None:
    trainers = []
    for alpha in (0.0, 5.0):
        ours = [
            replace(s, neftune_noise_alpha=alpha) if s.name == "a-lora" else s for s in mixed_specs(lr=1e-2)
        ]
        trainers.append(make_trainer(ours, tmp_path))
    plans = plans_of(trainers[0], 5)
    for trainer in trainers:
        train_together(trainer, plans)
    same = {
        name: torch.equal(trainers[0].bank.row(i), trainers[1].bank.row(i))
        for name, i in trainers[0].bank.ids.items()
    }
    assert same == {name: name != "a-lora" for name in same}


def test_noise_is_new_in_every_step_and_absent_from_evaluations(tmp_path: Path) -> None:
    trainer = make_trainer(specs(), tmp_path)
    row = plans_of(trainer, 1)[0].microbatches[0][0]
    assert trainer.noise(3, row) == trainer.noise(3, row) != trainer.noise(4, row)
    silent = make_trainer([replace(s, neftune_noise_alpha=0.0) for s in specs()], tmp_path)
    losses = [run.heldout(None, lambda share: None)["a"].nats for run in (trainer, silent)]
    assert losses[0].keys() == losses[1].keys()
    assert all((losses[0][i] == losses[1][i]).all() for i in losses[0])


def test_seeds_see_the_same_examples_in_the_same_order(tmp_path: Path) -> None:
    lora = next(s for s in mixed_specs(lr=1e-2) if s.name == "a-lora")
    seeds = [
        replace(lora, name=f"a-lora_seed{seed}", family=f"lora_seed{seed}", seed=seed, seeds_of="lora")
        for seed in (0, 1, 2)
    ]
    trainer = make_trainer([lora, *seeds], tmp_path)
    plans = plans_of(trainer, 5)
    for plan in plans:
        examples = {}
        for rows in plan.microbatches:
            for row in rows:
                examples.setdefault(row.adapter, set()).add(row.example)
        assert len(examples) == 4
        assert all(drawn == examples[0] for drawn in examples.values())
    starts = [trainer.bank.row(i).clone() for i in range(4)]
    assert torch.equal(starts[0], starts[1])  # the run's seed is 0
    assert not torch.equal(starts[1], starts[2])
    train_together(trainer, plans)
    assert torch.equal(trainer.bank.row(0), trainer.bank.row(1))
    assert (trainer.bank.row(2) - trainer.bank.row(3)).abs().max() > 1e-2


def test_seed_of_a_list_learns_as_the_same_seed_alone(tmp_path: Path) -> None:
    lora = replace(
        next(s for s in mixed_specs(lr=1e-2) if s.name == "a-lora"), dropout=0.2, neftune_noise_alpha=5.0
    )
    alone = make_trainer([replace(lora, seed=5)], tmp_path)
    member = replace(lora, name="a-lora_seed5", family="lora_seed5", seed=5, seeds_of="lora")
    listed = make_trainer([member], tmp_path)
    plans = plans_of(alone, 5)
    for trainer in (alone, listed):
        train_together(trainer, plans)
    assert torch.equal(alone.bank.row(0), listed.bank.row(0))
    other = make_trainer([replace(lora, seed=6)], tmp_path)
    assert alone.noise(0, plans[0].microbatches[0][0]) != other.noise(0, plans[0].microbatches[0][0])
