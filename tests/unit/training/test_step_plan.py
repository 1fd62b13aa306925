"""A step's plan predicts the step exactly."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from flora_train.adapters.bank import AdapterBank
from flora_train.data.batch import IGNORE, collate
from flora_train.training.step_plan import heldout_rows, plan_step
from tests.architectures import tiny_model
from tests.conftest import mixed_specs, spec
from tests.unit.training.harness import PAD, make_trainer, plans_of, random_split


def test_label_tokens_are_those_that_the_collated_batches_learn(tmp_path: Path) -> None:
    """The loss shifts labels by one: the first column of a batch is never learnt."""
    trainer = make_trainer(mixed_specs(), tmp_path, tokens_per_microbatch=40)
    for plan in plans_of(trainer):
        counted: dict[int, int] = defaultdict(int)
        for rows in plan.microbatches:
            batch = collate(rows, lambda task: trainer.tasks[task].train, PAD)
            for adapter, labels in zip(batch.adapter_ids.tolist(), batch.labels, strict=True):
                counted[adapter] += int((labels[1:] != IGNORE).sum())
        assert dict(plan.label_tokens) == counted


def test_all_methods_of_a_task_see_the_same_examples_in_the_same_step(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path)
    members = {task: [i for i, s in enumerate(trainer.bank.specs) if s.task == task] for task in "abc"}
    assert len(members["a"]) == 3
    for plan in plans_of(trainer):
        seen: dict[int, list[int]] = defaultdict(list)
        for rows in plan.microbatches:
            for row in rows:
                assert row.task == trainer.bank.specs[row.adapter].task
                seen[row.adapter].append(row.example)
        for adapters in members.values():
            assert len({tuple(sorted(seen[adapter])) for adapter in adapters}) == 1


def test_tokens_are_counted_per_adapter_and_once_per_task(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path)
    adapters_of = {"a": 3, "b": 2, "c": 2}
    for plan in plans_of(trainer):
        lengths = [
            int(trainer.tasks[row.task].train.lengths[row.example])
            for rows in plan.microbatches
            for row in rows
        ]
        assert plan.tokens == sum(lengths) <= trainer.config.training.tokens_per_step
        assert plan.tokens == sum(tokens * adapters_of[task] for task, tokens in plan.task_tokens.items())


def test_microbatches_hold_their_budget_and_are_ordered_by_adapter(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path, tokens_per_microbatch=40)
    plans = plans_of(trainer)
    assert any(len(plan.microbatches) > 2 for plan in plans)
    for plan in plans:
        for rows in plan.microbatches:
            assert max(row.length for row in rows) * len(rows) <= 40
            assert [row.adapter for row in rows] == sorted(row.adapter for row in rows)


def test_adapter_retires_after_its_last_step_and_the_run_ends_with_the_last_one(tmp_path: Path) -> None:
    specs = [spec("lora", "a", max_steps=2), spec("ia3", "a", max_steps=4), spec("flora", "b", max_steps=3)]
    trainer = make_trainer(specs, tmp_path)
    plans = plans_of(trainer, 40)
    taken = [sum(adapter in plan.label_tokens for plan in plans) for adapter in range(3)]
    assert taken == [2, 4, 3]
    assert plan_step(trainer.mixture, 40, trainer.tasks, trainer.bank, 4096) is None


def test_adding_an_adapter_to_another_task_changes_no_order_of_examples(tmp_path: Path) -> None:
    orders = []
    for specs in ([spec("lora", "a")], [spec("lora", "a"), spec("ia3", "b")]):
        trainer = make_trainer(specs, tmp_path)
        drawn = [draw.examples for n in range(12) for draw in trainer.mixture.step(n) if draw.task == "a"]
        orders.append(sum(drawn, ()))
    shorter = min(map(len, orders))
    assert shorter > 20
    assert orders[0][:shorter] == orders[1][:shorter]


def test_heldout_rows_give_every_contender_every_example() -> None:
    bank, split = AdapterBank.attach(tiny_model(), [spec("lora", "a"), spec("ia3", "b")]), random_split(0, 5)
    rows = heldout_rows(bank, [-1, 1], "a", split, 2)
    lengths = split.lengths.tolist()
    assert [(row.adapter, row.example, row.length) for row in rows] == [
        (-1, 0, lengths[0]),
        (1, 0, lengths[0]),
        (-1, 1, lengths[1]),
        (1, 1, lengths[1]),
    ]
    assert not any(row.window or row.shares_encoding or row.seed is not None for row in rows)
