"""The four guarantees (docs/isolation.md) and their sum: trained among many equals trained alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.spec import AdapterSpec
from flora_train.training.step_plan import StepPlan
from tests.conftest import mixed_specs
from tests.unit.training.harness import (
    largest_difference_to_training_alone,
    make_trainer,
    moved,
    only,
    plans_of,
    snapshot,
    train_together,
)

OPTIMIZERS = ["sgd", "adamw"]


def some_absent(plans: list[StepPlan], adapters: int) -> bool:
    return any(len(plan.label_tokens) < adapters for plan in plans)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
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
@pytest.mark.parametrize(
    "adapter_options",
    [
        pytest.param({"max_grad_norm": None}, id="unclipped"),
        pytest.param(
            {"max_grad_norm": 0.05, "weight_decay": 0.1, "lr_schedule": "cosine", "warmup_steps": 3},
            id="clipped-decayed",
        ),
    ],
)
@pytest.mark.quick(
    "clipped-decayed-plain-adamw",
    "unclipped-accumulation-sgd",
    "clipped-decayed-reentrant-checkpointing-sgd",
    "unclipped-checkpointing-and-accumulation-adamw",
)
def test_trained_together_equals_trained_alone(
    tmp_path: Path, optimizer: str, options: dict[str, Any], adapter_options: dict[str, Any]
) -> None:
    lr = {"adamw": 2e-3, "sgd": 0.3}[
        optimizer
    ]  # from 0.4 on, SGD on LoRA is unstable on some processors: any rounding grows step by step
    specs = [
        replace(s, dropout=0.2) if s.name == "a-lora" else s for s in mixed_specs(lr=lr, **adapter_options)
    ]
    options = {"optimizer": optimizer, **options}
    together = make_trainer(specs, tmp_path, **options)
    plans = plans_of(together)
    assert some_absent(plans, len(specs))
    assert options.get("tokens_per_microbatch", 4096) > 32 or any(
        len(plan.microbatches) > 1 for plan in plans
    )
    train_together(together, plans)
    assert min(moved(together).values()) > 1e-3
    differences = largest_difference_to_training_alone(together, plans, tmp_path, **options)
    assert max(differences.values()) <= 1e-5, differences


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_conversations_among_plain_rows_trained_together_equal_those_trained_alone(
    tmp_path: Path, optimizer: str, packed: bool
) -> None:
    """Rows of which several spans are learnt share micro-batches with rows that are learnt whole."""
    lr = {"adamw": 2e-3, "sgd": 0.3}[optimizer]
    specs = [replace(s, dropout=0.2) if s.name == "a-lora" else s for s in mixed_specs(lr=lr)]
    options: dict[str, Any] = {"optimizer": optimizer, "chats": ("a",), "tokens_per_step": 220}
    options |= {"packed_chats": ("b",)} if packed else {"chats": ("a", "b")}
    together = make_trainer(specs, tmp_path, **options)
    splits = {name: task.train for name, task in together.context.tasks.items()}
    assert all(len(splits[name].learnt_spans(0)) == 2 for name in "ab")
    assert splits["b"].is_packed == packed
    plans = plans_of(together)
    assert any({row.task for row in rows} == {"a", "b", "c"} for plan in plans for rows in plan.microbatches)
    train_together(together, plans)
    assert min(moved(together).values()) > 3e-4
    differences = largest_difference_to_training_alone(together, plans, tmp_path, **options)
    assert max(differences.values()) <= 1e-5, differences


def test_i1_gradient_depends_on_the_adapters_own_examples_only(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path)
    plan = plans_of(trainer, 1)[0]
    gradients = {}
    for name in ("all", "alone"):
        for adapter in plan.label_tokens:
            part = plan if name == "all" else None
            if part is None:
                groups = tuple(
                    tuple(row for row in group if row.adapter == adapter) for group in plan.microbatches
                )
                part = replace(
                    plan,
                    microbatches=tuple(filter(None, groups)),
                    label_tokens={adapter: plan.label_tokens[adapter]},
                )
            backward_only(trainer, part)
            gradients[name, adapter] = trainer.bank.gradient_row(adapter).clone()
            for pool in trainer.bank.pools:
                pool.gradients.zero_()
    for adapter in plan.label_tokens:
        torch.testing.assert_close(
            gradients["all", adapter], gradients["alone", adapter], rtol=1e-4, atol=1e-7
        )


def backward_only(trainer: Any, plan: StepPlan) -> None:
    """Trainer.step without its optimizer step."""
    step, trainer.optimizer.step = trainer.optimizer.step, lambda adapters, bad: {}
    count, trainer.metrics.count = trainer.metrics.count, lambda *args: None
    try:
        trainer.step(0, plan)
    finally:
        trainer.optimizer.step, trainer.metrics.count = step, count


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_i2_absent_adapter_and_its_optimizer_state_are_bit_identical(tmp_path: Path, optimizer: str) -> None:
    trainer = make_trainer(mixed_specs(weight_decay=0.1), tmp_path, optimizer=optimizer)
    absences = 0
    for number, plan in enumerate(plans_of(trainer)):
        before = snapshot(trainer)
        trainer.step(number, plan)
        after = snapshot(trainer)
        for name, adapter in trainer.bank.ids.items():
            same = all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
            assert same == (adapter not in plan.label_tokens), (number, name)
            absences += same
    assert absences > 10


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("victim", range(6))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_i3_poisoned_adapter_changes_no_bit_of_the_others(
    tmp_path: Path, optimizer: str, victim: int, poison: float
) -> None:
    """NaN or Inf in one adapter's parameters spoils its loss and gradient; it is skipped, the others do not
    notice."""
    healthy, poisoned = (make_trainer(mixed_specs(), tmp_path, optimizer=optimizer) for _ in range(2))
    plans = plans_of(healthy, 6)
    assert any(victim in plan.label_tokens for plan in plans[1:])
    for number, plan in enumerate(plans):
        if number == 1:
            poisoned.bank.row(victim).fill_(poison)
        healthy.step(number, plan)
        poisoned.step(number, plan)
    expected, got = snapshot(healthy), snapshot(poisoned)
    for name, adapter in healthy.bank.ids.items():
        same = all(torch.equal(a, b) for a, b in zip(expected[name], got[name], strict=True))
        assert same == (adapter != victim), name
    assert poisoned.metrics.skipped[victim] > 0
    assert all(poisoned.metrics.skipped[i] == 0 for i in range(6) if i != victim)


def test_i3_clipping_is_per_adapter(tmp_path: Path) -> None:
    """A neighbour with a huge gradient does not shrink an adapter's step, as a global norm would."""

    def specs(scale: float) -> list[AdapterSpec]:
        ours = mixed_specs(max_grad_norm=0.01, lr=0.5)
        return [replace(s, scaling=scale) if s.method == "lora" else s for s in ours]

    rows = []
    for scale in (1.0, 1e4):
        trainer = make_trainer(specs(scale), tmp_path, optimizer="sgd")
        train_together(trainer, plans_of(trainer, 4))
        assert max(step.gradient_norm for step in trainer.metrics.last_steps.values()) > 0.01
        rows.append(
            {
                s.name: trainer.bank.row(i).clone()
                for i, s in enumerate(trainer.bank.specs)
                if s.method != "lora"
            }
        )
    for name in rows[0]:
        assert torch.equal(rows[0][name], rows[1][name]), name


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_i4_gradients_under_checkpointing_equal_those_without(tmp_path: Path, checkpointing: str) -> None:
    gradients = []
    for mode in ("off", checkpointing):
        trainer = make_trainer(mixed_specs(), tmp_path, checkpointing=mode)
        backward_only(trainer, plans_of(trainer, 1)[0])
        gradients.append([pool.gradients.clone() for pool in trainer.bank.pools])
        assert all(g.abs().max() > 0 for g in gradients[-1][:1])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_i4_changing_the_routing_before_backward_ends_is_refused(tmp_path: Path, checkpointing: str) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path, checkpointing=checkpointing)
    batch = batch_of(trainer)
    trainer.bank.route(batch.adapter_ids)
    losses = trainer.row_losses(batch)
    with pytest.raises(RuntimeError, match="before the backward pass"):
        trainer.bank.route(batch.adapter_ids.flip(0))
    losses.sum().backward()
    trainer.bank.route(batch.adapter_ids.flip(0))
    trainer.row_losses(batch)
    trainer.bank.abandon()
    trainer.bank.route(batch.adapter_ids)


def test_dropout_masks_are_the_adapter_s_own_and_survive_recomputation(tmp_path: Path) -> None:
    """The same example, the same adapter: its gradient under dropout does not depend on neighbours or
    checkpointing."""
    specs = [replace(s, dropout=0.3) if s.method == "lora" else s for s in mixed_specs(lr=1e-2)]
    together = make_trainer(specs, tmp_path)
    plans = plans_of(together, 5)
    train_together(together, plans)
    lora = together.bank.ids["a-lora"]
    checkpointed = make_trainer(specs, tmp_path, checkpointing="non_reentrant")
    train_together(checkpointed, plans)
    torch.testing.assert_close(together.bank.row(lora), checkpointed.bank.row(lora), rtol=1e-4, atol=1e-6)
    undropped = make_trainer(mixed_specs(lr=1e-2), tmp_path)
    train_together(undropped, plans)
    assert (undropped.bank.row(lora) - together.bank.row(lora)).abs().max() > 1e-4
    others = [i for i, s in enumerate(together.bank.specs) if s.method != "lora"]
    assert all(torch.equal(undropped.bank.row(i), together.bank.row(i)) for i in others)


def batch_of(trainer: Any) -> Any:
    from flora_train.data.batch import collate

    rows = plans_of(trainer, 1)[0].microbatches[0]
    return collate(rows, lambda task: trainer.tasks[task].train, 0)


def test_only_keeps_one_adapter_s_rows(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path)
    plan = plans_of(trainer, 1)[0]
    adapter = next(iter(plan.label_tokens))
    part = only(plan, adapter)
    assert part is not None
    assert sum(map(len, part.microbatches)) == sum(
        row.adapter == adapter for group in plan.microbatches for row in group
    )
