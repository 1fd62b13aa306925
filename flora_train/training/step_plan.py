"""The rows of a step: every drawn example, once for each adapter that learns from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.schema import RunConfig
from flora_train.data.batch import Row, group_by_length
from flora_train.data.mixture import Stream, TaskMixture
from flora_train.data.splits import seed_of
from flora_train.data.task import Task
from flora_train.data.token_split import TokenSplit


@dataclass(frozen=True)
class StepPlan:
    """A step of the whole run. Every process makes the same plan, so that they need not exchange it."""

    microbatches: tuple[tuple[Row, ...], ...]
    label_tokens: Mapping[int, int]
    """Adapter id -> its label tokens in the whole step."""
    tokens: int
    """Tokens of all rows."""
    task_tokens: Mapping[str, int]
    """Task -> tokens drawn from it, counted once whatever the number of adapters that learn from them."""


def make_mixture(
    tasks: Mapping[str, Task],
    specs: Sequence[AdapterSpec],
    config: RunConfig,
    left: Mapping[str, int] | None = None,
    joined: Mapping[str, int] | None = None,
) -> TaskMixture:
    """The mixture over the tasks that have adapters. left: adapter name -> the first step without it; joined:
    task -> the first step with it (default 0); each has training.steps from there.
    """
    limits_of: dict[str, dict[str, int]] = defaultdict(dict)
    for spec in specs:
        limits_of[spec.task][spec.name] = spec.max_steps
    streams = []
    for task in tasks.values():
        if limits := limits_of.get(task.name):
            begins = (joined or {}).get(task.name, 0)
            streams.append(
                Stream(
                    task.name, task.train.lengths, task.weight, limits, begins, begins + config.training.steps
                )
            )
    return TaskMixture(streams, config.mixture, config.training.tokens_per_step, config.seed, left)


def plan_step(
    mixture: TaskMixture, number: int, tasks: Mapping[str, Task], bank: AdapterBank, max_tokens: int
) -> StepPlan | None:
    """Step `number` (from 0), or None when every adapter has left."""
    rows: list[Row] = []
    label_tokens: dict[int, int] = defaultdict(int)
    task_tokens: dict[str, int] = defaultdict(int)
    for draw in mixture.step(number):
        split = tasks[draw.task].train
        for example in draw.examples:
            length, window = int(split.lengths[example]), split.window(example)
            task_tokens[draw.task] += length
            for name in draw.adapters:
                adapter = bank.ids[name]
                seed = (
                    None
                    if window == 0
                    else seed_of(mixture.seed, f"augment {number}", draw.task, str(example))
                )
                rows.append(
                    Row(adapter, draw.task, example, length, window, bank.shares_encoding(adapter), seed)
                )
                label_tokens[adapter] += int(split.label_counts[example])
    if not rows:
        return None
    return StepPlan(
        microbatches=tuple(map(tuple, group_by_length(rows, max_tokens))),
        label_tokens=dict(label_tokens),
        tokens=sum(row.length for row in rows),
        task_tokens=dict(task_tokens),
    )


def heldout_rows(
    bank: AdapterBank, adapters: Sequence[int], task: str, split: TokenSplit, max_examples: int | None = None
) -> list[Row]:
    """The first held-out examples of a task for every one of these adapters (-1: the base model)."""
    return [
        Row(adapter, task, i, int(length), split.window(i), bank.shares_encoding(adapter))
        for i, length in enumerate(split.lengths[:max_examples])
        for adapter in adapters
    ]
