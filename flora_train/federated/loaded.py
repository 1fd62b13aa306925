"""What a federated run loads once, for all of its strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.config.schema import RunConfig
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.task import Task
from flora_train.data.tokenization import pad_token
from flora_train.evaluation.figures.intervals import Resampling
from flora_train.federated.population import Population
from flora_train.models.loading import load_base_model
from flora_train.models.shared_copy import shared_copy
from flora_train.run_context import load_data, prepare
from flora_train.runtime.checksum import fingerprint
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.context import TrainingContext
from flora_train.training.row_check import check_rows
from flora_train.training.trainer import Trainer


@dataclass(frozen=True)
class LoadedRun:
    """Data and base model of a federated run."""

    config: RunConfig
    folder: RunFolder
    tokenizer: Any
    tasks: Mapping[str, Task]
    model: nn.Module
    """The frozen base, to which no adapter is attached."""
    base: str
    """Its fingerprint."""

    @property
    def labels(self) -> LabelSpec | None:
        """What the heads predict, without weights; None for texts."""
        label = next(iter(self.tasks.values())).label
        return None if label is None else LabelSpec(label.task_type, label.labels)

    @property
    def resampling(self) -> Resampling:
        """Settings of the bootstrap."""
        evaluation = self.config.evaluation
        return Resampling(evaluation.bootstrap_samples, evaluation.confidence, self.config.seed)

    def trainer(
        self, specs: Sequence[AdapterSpec], population: Population, *, changes_base: bool = False
    ) -> Trainer:
        """A trainer of these adapters on the clients' tasks.

        Args:
            specs: The clients' adapters, and the global one.
            population: The clients.
            changes_base: Whether the weights of the base will change: they are then a copy.

        Returns:
            The trainer, whose bank has the adapters.
        """
        model = deepcopy(self.model) if changes_base else shared_copy(self.model)
        bank = AdapterBank.attach(model, specs, seed=self.config.seed)
        config = self.config.model_copy(update={"tasks": dict(population.configs)})
        context = TrainingContext(
            config=config,
            folder=self.folder,
            tasks=population.tasks,
            model=model,
            bank=bank,
            pad_token=pad_token(self.tokenizer),
        )
        return Trainer(context)


def load_federated(config: RunConfig, folder: RunFolder, device: torch.device) -> LoadedRun:
    """Read the data and load the base.

    Args:
        config: The run, resolved.
        folder: Its folder.
        device: Where it trains.

    Returns:
        The loaded run.

    Raises:
        UserError: Data or model are missing or cannot be used, or the model mixes the rows of a batch.
    """
    prepare(config, device)
    tokenizer, tasks, speech_processor = load_data(config)
    if speech_processor is not None:
        speech_processor.store.close()
        raise user_error("model.path", config.model.path, "is a speech model, which clients do not train")
    for name, task in tasks.items():
        if not len(task.evaluated):
            raise user_error(f"tasks.{name}", None, "has no held-out examples to evaluate the adapter on")
    model = load_base_model(config.model, device).requires_grad_(False)
    check_rows(model, pad_token(tokenizer))
    return LoadedRun(config, folder, tokenizer, tasks, model, fingerprint(model))
