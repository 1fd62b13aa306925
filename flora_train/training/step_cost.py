"""Measures what a training step costs on this machine, with random weights and one or two of the layers."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.pool import Pool
from flora_train.adapters.shallow import on_shallow_model
from flora_train.adapters.spec import expand
from flora_train.config.schema import RunConfig
from flora_train.data.audio.collate import SpeechCollate
from flora_train.data.audio.speech_processor import SpeechProcessor
from flora_train.data.batch import collate, padded_tokens
from flora_train.data.mixture import TaskMixture
from flora_train.data.task import Task, label_names
from flora_train.models.loading import count_layers, empty_model, set_mode, shallow_model
from flora_train.models.probe_inputs import noise_features
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.context import TrainingContext
from flora_train.training.references import zero_references
from flora_train.training.row_check import check_rows
from flora_train.training.step_plan import StepPlan, make_mixture, plan_step
from flora_train.training.trainer import Trainer

STEPS_PLANNED = 200
"""Steps among which the largest is searched."""


@dataclass(frozen=True)
class Cost:
    """Cost of the largest training step on one process."""

    step_seconds: float
    activations: int
    """Bytes that a micro-batch keeps for its backward."""


def adapters_of_steps(config: RunConfig, tasks: Mapping[str, Task]) -> list[frozenset[str]]:
    """The adapters of each of the first STEPS_PLANNED steps."""
    mixture = make_mixture(tasks, expand(config, label_names(tasks)), config)
    adapters = []
    for number in planned_steps(config):
        draws = mixture.step(number)
        if draws:
            adapters.append(frozenset(name for draw in draws for name in draw.adapters))
    return adapters


def step_slots(pools: Sequence[Pool], steps: Sequence[Collection[str]]) -> int:
    """Slots of the largest adapter that the adapters of one step fill at most."""
    value_counts = {spec.name: pool.row_size for pool in pools for spec in pool.specs}
    step_values = max(sum(value_counts[name] for name in names) for names in steps)
    return -(-step_values // max(pool.row_size for pool in pools))


def cost_of_a_step(
    config: RunConfig,
    device: torch.device,
    tasks: Mapping[str, Task],
    *,
    pad_token: int,
    speech_processor: SpeechProcessor | None,
) -> Cost:
    """The cost with all layers, extrapolated from what a second layer adds to the first: of the model, or of
    its encoder and of its decoder if they differ in number."""
    measured = partial(measure, config, device, tasks, pad_token=pad_token, speech_processor=speech_processor)
    layers, decoder_layers = count_layers(config.model)
    one = measured(layers=1)
    if decoder_layers in (None, layers):
        return _extended(one, [(layers, measured(layers=2))])
    two_encoders = measured(layers=2, decoder_layers=1)
    two_decoders = measured(layers=1, decoder_layers=2)
    return _extended(one, [(layers, two_encoders), (decoder_layers or 1, two_decoders)])


def _extended(one: Cost, parts: Sequence[tuple[int, Cost]]) -> Cost:
    """The cost of all layers. parts: (number of layers, the cost with two of them)."""
    seconds, activations = one.step_seconds, one.activations
    for layers, two in parts:
        seconds += (layers - 1) * max(0.0, two.step_seconds - one.step_seconds)
        activations += (layers - 1) * max(0, two.activations - one.activations)
    return Cost(seconds, activations)


def measure(
    config: RunConfig,
    device: torch.device,
    tasks: Mapping[str, Task],
    *,
    layers: int,
    pad_token: int,
    speech_processor: SpeechProcessor | None,
    decoder_layers: int | None = None,
) -> Cost:
    """Run the largest micro-batch of the step with the most tokens: forward, backward and update, with the
    adapters of that step only. Takes the faster of two timed steps, after one warm-up.

    decoder_layers: of an encoder-decoder. Default: as many as its encoder has.
    """
    specs = expand(config, label_names(tasks))
    mixture = make_mixture(tasks, specs, config)
    number = max(planned_steps(config), key=lambda number: _tokens_of(mixture, number))
    names = {name for draw in mixture.step(number) for name in draw.adapters}
    present = [spec for spec in specs if spec.name in names]
    model = shallow_model(config.model, layers, device, decoder_layers=decoder_layers)
    features = None if speech_processor is None else noise_features(speech_processor.store.extractor)
    full = empty_model(config.model)
    present = [on_shallow_model(spec, model, full) for spec in present]
    bank = AdapterBank.attach(model, present, seed=config.seed, features=features)
    check_rows(model, pad_token, features)
    plan = plan_step(mixture, number, tasks, bank, config.training.tokens_per_microbatch)
    assert plan is not None
    part, share = _largest_microbatch(plan)
    present_tasks = {spec.task for spec in present}
    make_batch = collate
    if speech_processor is not None:
        make_batch = SpeechCollate(speech_processor.store, config.audio.spec_augment)
    trainer = Trainer(
        TrainingContext(
            config=config,
            folder=RunFolder(Path(config.folder)),
            tasks={name: task for name, task in tasks.items() if name in present_tasks},
            model=model,
            bank=bank,
            pad_token=pad_token,
            collate=make_batch,
            references=zero_references(bank, tasks),
        )
    )
    set_mode(model, training=True)
    seconds, saved = _time_steps(trainer, part)
    tensors = [*model.parameters(), *bank.tensors().values()]
    parameters = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    activations = sum(size for address, size in saved.storages.items() if address not in parameters)
    return Cost(seconds * share, activations)


def planned_steps(config: RunConfig) -> range:
    """The steps that a plan looks at."""
    return range(min(config.training.steps, STEPS_PLANNED))


def _tokens_of(mixture: TaskMixture, number: int) -> int:
    return sum(mixture.tokens_of(draw) for draw in mixture.step(number))


def _largest_microbatch(plan: StepPlan) -> tuple[StepPlan, float]:
    """A step of the largest micro-batch alone, and how many times its padded tokens the whole step has."""
    padded = [padded_tokens(rows) for rows in plan.microbatches]
    largest = padded.index(max(padded))
    rows = plan.microbatches[largest]
    adapters = {row.adapter for row in rows}
    label_tokens = {adapter: count for adapter, count in plan.label_tokens.items() if adapter in adapters}
    part = replace(
        plan, microbatches=(rows,), label_tokens=label_tokens, tokens=padded[largest], task_tokens={}
    )
    return part, sum(padded) / padded[largest]


def _time_steps(trainer: Trainer, plan: StepPlan) -> tuple[float, _SavedTensors]:
    """Seconds of the faster of two steps, and what autograd saved in a warm-up step before them."""
    saved = _SavedTensors()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        trainer.step(0, plan)
    seconds = []
    for number in (1, 2):
        started = time.perf_counter()
        trainer.step(number, plan)
        if trainer.bank.device.type == "cuda":
            torch.cuda.synchronize(trainer.bank.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds), saved


class _SavedTensors:
    """The tensors that autograd keeps for a backward."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        """Address -> bytes, each storage counted once."""

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor
