"""A Trainer on a tiny model and random tokens, and the same adapter trained alone on the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.load import validate
from flora_train.data.task import Task
from flora_train.data.tokens import SplitCounts, TokenSplit
from flora_train.training.plan import StepPlan, plan_step
from flora_train.training.run_folder import RunFolder
from flora_train.training.trainer import Trainer
from tests.conftest import VOCABULARY, tiny_model

PAD = 0


def random_split(seed: int, examples: int, longest: int = 14) -> TokenSplit:
    """Examples of 4 to `longest` random tokens, some with a prompt."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, longest + 1, examples)
    return TokenSplit(
        tokens=generator.integers(2, VOCABULARY, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        prompt_lengths=generator.integers(0, 3, examples).astype(np.int32),
        label_bytes=lengths.astype(np.int64),
        counts=SplitCounts(rows=examples, examples=examples, tokens=int(lengths.sum())),
    )


def make_trainer(
    specs: Sequence[AdapterSpec],
    folder: Path,
    architecture: str = "llama",
    checkpointing: str = "off",
    device: str = "cpu",
    **training: Any,
) -> Trainer:
    """A trainer for `specs` on tasks a, b and c; same arguments, same trainer."""
    source = {"train": "unused.jsonl"}
    config = validate(
        {
            "name": "test",
            "model": {"path": "unused"},
            "tasks": dict.fromkeys("abc", source),
            "adapters": {"unused": {"method": "ia3", "lr": 1e-3}},
            "mixture": {"strategy": "uniform"},
            "training": {"steps": 20, "tokens_per_step": 90, "tokens_per_microbatch": 4096, "max_length": 16, **training},
        }
    )
    model: Any = tiny_model(architecture).to(device)
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    model.train()
    tasks = {name: Task(name, 1.0, random_split(i, 40), random_split(10 + i, 6), "") for i, name in enumerate("abc")}
    bank = AdapterBank.attach(model, specs)
    return Trainer(config, model, bank, tasks, PAD, RunFolder(folder), SimpleNamespace(log=lambda *args, **options: None))


def plans_of(trainer: Trainer, steps: int = 20) -> list[StepPlan]:
    plans = [
        plan_step(trainer.mixture, n, trainer.tasks, trainer.bank, trainer.config.training.tokens_per_microbatch)
        for n in range(steps)
    ]
    return [plan for plan in plans if plan is not None]


def only(plan: StepPlan, adapter: int) -> StepPlan | None:
    """The part of a plan that concerns one adapter, whose id becomes 0; None if it is absent."""
    if adapter not in plan.label_tokens:
        return None
    groups = [tuple(replace(row, adapter=0) for row in group if row.adapter == adapter) for group in plan.microbatches]
    return replace(plan, microbatches=tuple(filter(None, groups)), label_tokens={0: plan.label_tokens[adapter]})


def train_together(trainer: Trainer, plans: Sequence[StepPlan]) -> None:
    for number, plan in enumerate(plans):
        trainer.step(number, plan)


def largest_difference_to_training_alone(
    together: Trainer, plans: Sequence[StepPlan], folder: Path, **options: Any
) -> dict[str, float]:
    """max |dW| per adapter between the trained bank and every adapter trained alone on its part of the same plans."""
    differences = {}
    for name, adapter in together.bank.ids.items():
        alone = make_trainer([together.bank.specs[adapter]], folder, **options)
        for number, plan in enumerate(plans):
            part = only(plan, adapter)
            if part is not None:
                alone.step(number, part)
        differences[name] = float((alone.bank.row(0) - together.bank.row(adapter)).abs().max())
    return differences


def moved(trainer: Trainer) -> dict[str, float]:
    """How far every adapter is from its start: an isolation test on adapters that stand still proves nothing."""
    start = AdapterBank.attach(tiny_model(), trainer.bank.specs)
    return {name: float((start.row(i) - trainer.bank.row(i)).abs().max()) for name, i in trainer.bank.ids.items()}


def snapshot(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """Every adapter's numbers and optimizer state, bit by bit."""
    states: dict[str, list[torch.Tensor]] = {}
    for name, adapter in trainer.bank.ids.items():
        pool, slot = trainer.bank.location[adapter]
        moments = trainer.optimizer.moments.get(id(pool), ())
        count = torch.tensor(trainer.optimizer.steps[adapter])
        states[name] = [pool.values[slot].clone(), *(moment[slot].clone() for moment in moments), count]
    return states
