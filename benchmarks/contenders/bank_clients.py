"""Federated clients as adapters of one bank, on texts of random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders.peft_clients import ClientBatch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec, make_spec
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.data.batch import Row
from flora_train.data.documents import EncodedDocument, EncodedExample
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.labels.split import LabelSplit, label_split
from flora_train.data.mixture import Draw
from flora_train.data.split_builder import SplitBuilder
from flora_train.data.task import Task
from flora_train.federated.local_training import Client, LocalSteps
from flora_train.federated.rounds import RoundOptions
from flora_train.federated.simulation import Simulation
from flora_train.federated.specs import client_spec
from flora_train.federated.state import GlobalState, initial_state
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.context import TrainingContext
from flora_train.training.step_plan import plan_draws
from flora_train.training.trainer import Trainer

BATCH = 8
"""Texts of a local step."""
ADAPTER: dict[str, Any] = {
    "method": "lora",
    "rank": 8,
    "target_modules": ["query", "value"],
    "lr": 4e-3,
    "head_lr": 2e-2,
    "lr_schedule": "constant",
}
MICROBATCH = 1024
"""Padded tokens of a forward: texts of a micro-batch have similar lengths, so that smaller ones pad less."""
SEED = 0
FIRST_TOKEN = 1000
"""Of the vocabulary of BERT; smaller ids are special or unused."""


class ClientTexts:
    """The texts of all clients: as many for each, with random tokens and labels.

    Args:
        clients: Their number.
        lengths: Tokens of a text, one of which is drawn for each.
        steps: Local steps of a round; a client has as many texts as they need.
        labels: Outputs of the head.
        vocabulary: Size of the base's vocabulary.
    """

    def __init__(
        self, clients: int, lengths: Sequence[int], *, steps: int, labels: int, vocabulary: int
    ) -> None:
        label = LabelSpec("single", tuple(f"label_{i}" for i in range(labels)))
        names = [f"client_{i:03d}" for i in range(clients)]
        self.config = _config(names, max(lengths))
        self.spec: AdapterSpec = make_spec(
            "server", "lora", self.config.adapters["lora"], default_steps=steps, labels=label
        )
        """The global adapter."""
        self.specs = [client_spec(self.spec, name) for name in names]
        self.local = LocalSteps(batch_examples=BATCH, steps=steps)
        first = FIRST_TOKEN if vocabulary > 2 * FIRST_TOKEN else 3
        self.tasks = {}
        for number, name in enumerate(names):
            split = _texts(number, steps * BATCH, lengths, label=label, tokens=(first, vocabulary))
            self.tasks[name] = Task(name, 1.0, split, split, "", label=label)
        everything = tuple(range(steps * BATCH))
        self.clients = [Client(spec.task, spec.name, everything) for spec in self.specs]

    def batches(self) -> list[tuple[int, list[ClientBatch]]]:
        """The first round: (number of examples, batches) of each client."""
        found = []
        for client in self.clients:
            split = self.tasks[client.name].train
            assert isinstance(split, LabelSplit)
            batches = self.local.batches(client, 0, SEED)
            found.append((len(client.examples), [_batch(split, examples) for examples in batches]))
        return found


class BankClients:
    """The clients as adapters of one bank.

    Args:
        model: The frozen base.
        texts: Of the clients.
    """

    def __init__(self, model: nn.Module, texts: ClientTexts) -> None:
        self.texts = texts
        self.bank = AdapterBank.attach(model, texts.specs)
        self.trainer = Trainer(
            TrainingContext(
                config=texts.config,
                folder=RunFolder(Path("unused")),
                tasks=texts.tasks,
                model=model,
                bank=self.bank,
                pad_token=0,
            )
        )
        self.start: GlobalState = initial_state(self.bank.pools[0], texts.spec, base="base", seed=SEED)

    def simulation(self, algorithm: str, at_once: int | None = None) -> Simulation:
        """Before the first round, from the initial adapter. at_once: clients in one forward; None: all."""
        options = RoundOptions(
            algorithm=algorithm, local=self.texts.local, seed=SEED, clients_at_once=at_once
        )
        return Simulation(self.trainer, self.texts.clients, self.start, options=options)

    def round(self, algorithm: str, at_once: int | None = None) -> Simulation:
        """The first round; the simulation afterwards."""
        simulation = self.simulation(algorithm, at_once)
        simulation.round()
        return simulation

    def microbatches(self) -> list[tuple[Row, ...]]:
        """The rows of each forward of the first round, with all clients at once."""
        texts, found = self.texts, []
        batches = [texts.local.batches(client, 0, SEED) for client in texts.clients]
        for step in zip(*batches, strict=True):
            draws = []
            for client, examples in zip(texts.clients, step, strict=True):
                draws.append(Draw(client.name, examples, (client.adapter,)))
            max_tokens = texts.config.training.tokens_per_microbatch
            plan = plan_draws(draws, texts.tasks, self.bank, number=0, seed=SEED, max_tokens=max_tokens)
            assert plan is not None
            found += plan.microbatches
        return found


def _config(names: Sequence[str], length: int) -> RunConfig:
    source = {"train": "unused.jsonl", "text": "text", "label": "label"}
    return validate(
        {
            "name": "federated_round",
            "model": {"path": "unused"},
            "tasks": dict.fromkeys(names, source),
            "adapters": {"lora": ADAPTER},
            "training": {"steps": 1, "tokens_per_microbatch": MICROBATCH, "max_length": length},
        }
    )


def _texts(
    seed: int, count: int, lengths: Sequence[int], *, label: LabelSpec, tokens: tuple[int, int]
) -> LabelSplit:
    generator = np.random.default_rng(seed)
    builder = SplitBuilder()
    for _ in range(count):
        text = generator.integers(*tokens, generator.choice(lengths)).astype(np.int32)
        target = (float(generator.integers(len(label.labels))),)
        builder.add(EncodedExample((EncodedDocument(text, (), 0),), "whole", target=target))
    return label_split(builder.split(), label)


def _batch(split: LabelSplit, examples: Sequence[int]) -> ClientBatch:
    texts = [torch.from_numpy(split.example(i).astype(np.int64)) for i in examples]
    masks = [torch.ones_like(text) for text in texts]
    labels = torch.tensor([split.target(i) for i in examples])
    inputs = {
        "input_ids": pad_sequence(texts, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
    }
    return inputs, labels
