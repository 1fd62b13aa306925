"""A bank of clients on a tiny model and random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flora_train.adapters.spec import AdapterSpec
from flora_train.data.labels.spec import LabelSpec
from flora_train.federated.local_training import Client, LocalSteps
from flora_train.federated.rounds import RoundOptions
from flora_train.federated.simulation import Deliver, Simulation
from flora_train.federated.specs import client_spec, sparse_spec
from flora_train.federated.state import GlobalState, initial_state
from flora_train.runtime.checksum import fingerprint
from flora_train.training.trainer import Trainer
from tests.conftest import spec
from tests.unit.training.harness import make_trainer

NAMES = ("client_0", "client_1", "client_2", "client_3")
LABELS = LabelSpec("single", ("x", "y", "z"))
SIZES = (9, 5, 12, 7)
"""Examples of each client."""


def server_spec(method: str = "lora", **options: Any) -> AdapterSpec:
    """The global adapter; `sparse` is that of SLoRA's first stage."""
    options = {"lr": 5e-3, "steps": 1000, **options}
    if method == "sparse":
        return sparse_spec(spec("lora", "server", rank=3, **options), density=0.05, seed=3)
    if method == "pure":
        return spec("flora", "server", "pure", **{"rank": 3, "variant": "pure", **options})
    if method in ("lora", "flora"):
        options = {"rank": 3, **options}
    return spec(method, "server", **options)


def federated_trainer(folder: Path, specs: Sequence[AdapterSpec], **options: Any) -> Trainer:
    """A trainer on a small BERT whose tasks are the clients' labelled texts."""
    labels = dict.fromkeys(NAMES, LABELS)
    return make_trainer(specs, folder, architecture="bert", labels=labels, **options)


def clients_of(adapters: Sequence[AdapterSpec]) -> list[Client]:
    """A client for each adapter, with a number of examples of its own."""
    found = []
    for own in adapters:
        size = SIZES[NAMES.index(own.task)]
        found.append(Client(own.task, own.name, tuple(range(size))))
    return found


def make_simulation(
    folder: Path,
    method: str = "lora",
    *,
    ranks: Sequence[int | None] = (None, None, None, None),
    deliver: Deliver = lambda update: update,
    optimizer: str = "adamw",
    adapter: dict[str, Any] | None = None,
    base: str | None = None,
    local: LocalSteps | None = None,
    guard: dict[str, Any] | None = None,
    **options: Any,
) -> Simulation:
    """Four clients with heads. ranks: of each client; options: of RoundOptions."""
    whole = server_spec(method, **(adapter or {}))
    specs = [client_spec(whole, name, rank) for name, rank in zip(NAMES, ranks, strict=True)]
    trainer = federated_trainer(folder, specs, optimizer=optimizer, guard=guard)
    state = start_of(trainer, whole, base)
    rounds = RoundOptions(local=local or LocalSteps(batch_examples=4), **options)
    return Simulation(trainer, clients_of(specs), state, options=rounds, deliver=deliver)


def start_of(trainer: Trainer, whole: AdapterSpec, base: str | None = None) -> GlobalState:
    """The state before the first round."""
    pool = next(pool for pool in trainer.bank.pools if pool.method.name == whole.method)
    return initial_state(pool, whole, base=base or fingerprint(trainer.model), seed=0)
