"""Hours of a run on a GPU that this machine does not have, estimated from a step that was measured on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import nn

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.schema import RunConfig
from flora_train.data.preferences.preference import BATCH
from flora_train.data.task import Task
from flora_train.training.step_cost import planned_steps
from flora_train.training.step_memory import StepMemory
from flora_train.training.step_plan import make_mixture

MEASURED_ON = "an H100 80 GB"
SOURCE = "benchmarks/results/large_step_cuda.md"
"""The figures below: 8 adapters of rank 16 on every linear layer of a StarCoder2-3B, 512 tokens each."""
MEASURED_SPEED = {"lora": 18050, "flora": 12266}
"""Method -> tokens of a whole training step in a second."""
MEASURED_PARAMETERS = 3_030_371_328
OPERATIONS = 4
"""Floating point operations of a training step for each token and parameter: 2 in the forward, 2 for the
gradient of the input. The frozen base has no other."""
FLOPS = {method: OPERATIONS * MEASURED_PARAMETERS * speed for method, speed in MEASURED_SPEED.items()}
"""Method -> floating point operations in a second. IA3 counts as LoRA."""
PEAK = {80: 989e12, 24: 165e12}
"""Gigabytes of a GPU -> bfloat16 operations in a second by the data sheets of an H100 and an RTX 4090."""
SHORT_TEXT = 200
"""Tokens of a usual solution: most end long before evaluation.max_new_tokens."""
PROBLEMS_OF_A_LANGUAGE = 161
"""Of MultiPL-E's HumanEval, in most languages."""


@dataclass(frozen=True)
class Work:
    """Method -> floating point operations of the parts of a run."""

    training: Mapping[str, float]
    recomputing: Mapping[str, float]
    """What gradient checkpointing adds to the training."""
    heldout: Mapping[str, float]
    generated_token: float
    """Of one token that is generated."""
    completions: int
    """Texts that are generated for programming problems."""
    max_new_tokens: int
    clip: float
    """Of one clip that is transcribed; 0 for text."""
    contenders: int
    """Adapters and the base, each in its languages: transcripts of one clip of every language."""


def learnt_rows(task: Task) -> int:
    """Rows with a gradient that an example has for each adapter."""
    if task.embedding is not None:
        return task.embedding.texts
    preference = task.preference
    return 2 if preference is not None and preference.is_paired else 1


def heldout_rows_of(task: Task) -> int:
    """Rows that a held-out example has for each contender."""
    if task.embedding is not None:
        return task.embedding.texts
    preference = task.preference
    return 1 if preference is None or preference.is_supervised else 2


def _sum(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {method: first.get(method, 0.0) + second.get(method, 0.0) for method in {**first, **second}}


@dataclass
class _Rows:
    """Method -> rows."""

    counts: dict[str, float] = field(default_factory=dict)

    def add(self, method: str, rows: float) -> None:
        self.counts[method] = self.counts.get(method, 0.0) + rows

    def times(self, operations: float) -> dict[str, float]:
        return {method: rows * operations for method, rows in self.counts.items()}


def work_of(
    config: RunConfig,
    model: nn.Module,
    specs: Sequence[AdapterSpec],
    *,
    tasks: Mapping[str, Task],
    step: StepMemory,
    completions: int,
) -> Work:
    """The work of a run. completions: texts that are generated for programming problems."""
    forward = step.flops / step.batch.rows
    head = _head_operations(model)
    labels = step.batch.tokens * head
    methods = {spec.name: spec.layer_method for spec in specs}
    trained, frozen = _Rows(), _Rows()
    mixture, numbers = make_mixture(tasks, specs, config), planned_steps(config)
    for draw in chain.from_iterable(mixture.step(number) for number in numbers):
        examples = len(draw.examples) * config.training.steps / len(numbers)
        preference = tasks[draw.task].preference
        for adapter in draw.adapters:
            trained.add(methods[adapter], examples * learnt_rows(tasks[draw.task]))
            if preference is not None and preference.objective == "kto":
                frozen.add(methods[adapter], examples)  # of the KL term
        if preference is not None and preference.has_reference and preference.reference == BATCH:
            frozen.add("base", examples * 2)
    return Work(
        training=_sum(trained.times(2 * (forward + labels)), frozen.times(forward + labels)),
        recomputing=trained.times(forward),
        heldout=_heldout_rows(config, specs, tasks).times(forward + labels),
        generated_token=forward / step.batch.length + head,
        completions=completions,
        max_new_tokens=config.evaluation.max_new_tokens,
        clip=forward + labels if step.batch.window else 0.0,
        contenders=len(specs) + len(tasks),
    )


def hours(operations: Mapping[str, float], gigabytes: int, gpus: int) -> float:
    """Hours of this many operations, if the GPUs share them evenly."""
    seconds = sum(count / FLOPS[_counted_as(method)] for method, count in operations.items())
    return seconds * PEAK[80] / PEAK[gigabytes] / gpus / 3600


def generation_hours(work: Work, tokens: int, gigabytes: int, gpus: int) -> float:
    """Hours of generation, if each text has `tokens` tokens."""
    return hours({"flora": work.completions * tokens * work.generated_token}, gigabytes, gpus)


def _counted_as(method: str) -> str:
    return method if method in FLOPS else "lora"


def _head_operations(model: Any) -> int:
    """Of the output head for one token in a forward; 0 for an encoder, which has none."""
    head = model.get_output_embeddings()
    return 0 if head is None else 2 * head.weight.numel()


def _heldout_rows(config: RunConfig, specs: Sequence[AdapterSpec], tasks: Mapping[str, Task]) -> _Rows:
    """Rows of all held-out evaluations: some examples at intervals, and all, with the base, at the end."""
    evaluation, rows = config.evaluation, _Rows()
    times = config.training.steps // (evaluation.interval or config.training.steps)
    for spec in specs:
        examples, of_each = len(tasks[spec.task].validation), heldout_rows_of(tasks[spec.task])
        evaluated = examples + times * min(examples, evaluation.max_examples or examples)
        rows.add(spec.layer_method, of_each * evaluated)
    for task in tasks.values():
        rows.add("base", heldout_rows_of(task) * len(task.validation))
    return rows
