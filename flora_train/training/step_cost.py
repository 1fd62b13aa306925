"""What does a run's model cost for each of its layers, on this machine? Measured on one and on two of them, with random weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec, expand
from flora_train.config.schema import RunConfig
from flora_train.data.audio.collate import SpeechCollate
from flora_train.data.audio.speech_processor import SpeechProcessor
from flora_train.data.batch import collate
from flora_train.data.task import Task
from flora_train.models.loading import count_layers, set_mode, shallow_model
from flora_train.models.probe_inputs import noise_features
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.row_check import check_rows
from flora_train.training.step_plan import StepPlan, make_mixture, plan_step
from flora_train.training.trainer import Trainer

STEPS_SEEN = 200
"""Steps that are looked at for the largest."""


@dataclass(frozen=True)
class Cost:
    """step_seconds: of a step on one process; activations: bytes that a micro-batch keeps for its backward."""

    step_seconds: float
    activations: int


def adapters_of_steps(config: RunConfig, tasks: Mapping[str, Task]) -> list[frozenset[str]]:
    """The adapters of the first STEPS_SEEN steps."""
    mixture = make_mixture(tasks, expand(config), config)
    steps = (mixture.step(number) for number in range(min(config.training.steps, STEPS_SEEN)))
    return [frozenset(name for draw in draws for name in draw.adapters) for draws in steps if draws]


def cost_of_a_step(
    config: RunConfig, device: torch.device, tasks: Mapping[str, Task], pad: int, speech_processor: SpeechProcessor | None
) -> Cost:
    """What all layers cost, by what the second adds to the first."""
    one, two = (measure(config, layers, device, tasks, pad, speech_processor) for layers in (1, 2))
    more = count_layers(config.model) - 1
    return Cost(
        one.step_seconds + more * max(0.0, two.step_seconds - one.step_seconds),
        one.activations + more * max(0, two.activations - one.activations),
    )


def measure(
    config: RunConfig,
    layers: int,
    device: torch.device,
    tasks: Mapping[str, Task],
    pad: int,
    speech_processor: SpeechProcessor | None,
) -> Cost:
    """The largest micro-batch of the first step that holds most tokens, forward, backward and update; the better of two after a first.
    Only the adapters of that step are there."""
    specs = expand(config)
    mixture = make_mixture(tasks, specs, config)
    numbers = range(min(config.training.steps, STEPS_SEEN))
    number = max(numbers, key=lambda number: sum(mixture.tokens_of(draw) for draw in mixture.step(number)))
    present = {name for draw in mixture.step(number) for name in draw.adapters}
    there: list[AdapterSpec] = [spec for spec in specs if spec.name in present]
    model = shallow_model(config.model, layers, device)
    features = None if speech_processor is None else noise_features(speech_processor.store.extractor)
    bank = AdapterBank.attach(model, there, seed=config.seed, features=features)
    check_rows(model, pad, features)
    plan = plan_step(mixture, number, tasks, bank, config.training.tokens_per_microbatch)
    assert plan is not None
    padded, rows = max(((rows[0].length * len(rows), rows) for rows in plan.microbatches), key=lambda pair: pair[0])
    share = sum(rows[0].length * len(rows) for rows in plan.microbatches) / padded
    used = {row.adapter for row in rows}
    part = StepPlan((rows,), {a: n for a, n in plan.label_tokens.items() if a in used}, padded, {})
    learnt = {spec.task for spec in there}
    trainer = Trainer(
        config,
        model,
        bank,
        {name: task for name, task in tasks.items() if name in learnt},
        pad,
        RunFolder(Path(config.folder)),
        SimpleNamespace(log=lambda *args, **options: None),
        collate if speech_processor is None else SpeechCollate(speech_processor.store, config.audio.spec_augment),
    )
    set_mode(model, training=True)
    saved = _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        trainer.step(0, part)
    seconds = []
    for again in (1, 2):
        started = time.perf_counter()
        trainer.step(again, part)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *bank.tensors().values()]}
    return Cost(min(seconds) * share, sum(size for place, size in saved.storages.items() if place not in parameters))


class _Saved:
    """What autograd keeps for a backward. storages: address -> bytes, each counted once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor
