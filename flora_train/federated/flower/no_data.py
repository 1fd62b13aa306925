"""A server without data: it knows the clients' names and labels from the recipe, and no example."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flora_train.config.errors import user_error
from flora_train.config.federated_schema import GLOBAL_TASK
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.task import Task
from flora_train.data.token_split import SplitCounts, TokenSplit
from flora_train.federated.loaded import LoadedRun
from flora_train.federated.population import ClientData, Population, names_of_clients
from flora_train.models.loading import load_base_model, load_tokenizer
from flora_train.run_context import prepare
from flora_train.runtime.checksum import fingerprint
from flora_train.runtime.run_folder import RunFolder


def load_without_data(config: RunConfig, folder: RunFolder, device: torch.device) -> LoadedRun:
    """Load the base, and make tasks without examples.

    Args:
        config: The run, resolved.
        folder: Its folder.
        device: Where the server step is computed.

    Returns:
        The loaded run.

    Raises:
        UserError: The recipe does not list the labels of its tasks.
    """
    prepare(config, device)
    tokenizer: Any = load_tokenizer(config.model)
    tasks = {name: _task(name, task) for name, task in config.tasks.items()}
    model = load_base_model(config.model, device).requires_grad_(False)
    return LoadedRun(config, folder, tokenizer, tasks, model, fingerprint(model))


def population_without_data(loaded: LoadedRun) -> Population:
    """The clients' names, without examples."""
    config = loaded.config
    names = names_of_clients(config)
    first = next(iter(loaded.tasks))
    tasks, configs = {}, {}
    for name in [*names, GLOBAL_TASK]:
        own = name if name in loaded.tasks else first
        tasks[name], configs[name] = loaded.tasks[own], config.tasks[own]
    clients = tuple(ClientData(name, (), ()) for name in names)
    return Population(clients, tasks, configs, shares_heldout=True)


def _task(name: str, task: TaskConfig) -> Task:
    label = None
    if task.has_head:
        if not task.labels:
            hint = "is required with server-data=false: list the labels, in the order that the clients have"
            raise user_error(f"tasks.{name}.labels", None, hint)
        label = LabelSpec("single", tuple(task.labels))
    return Task(name, 1.0, _empty(), _empty(), data_hash="", label=label)


def _empty() -> TokenSplit:
    begin = np.zeros(1, dtype=np.int64)
    return TokenSplit(
        tokens=np.zeros(0, dtype=np.int32),
        offsets=begin,
        spans=np.zeros((0, 2), dtype=np.int32),
        span_offsets=begin,
        label_bytes=np.zeros(0, dtype=np.int64),
        pack_offsets=begin,
        counts=SplitCounts(),
    )
