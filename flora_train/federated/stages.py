"""The stages of a strategy: which global adapter is trained in which rounds, and how it is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flora_train.adapters.spec import AdapterSpec, make_spec
from flora_train.config.federated_schema import DEFAULT_CLIENTS, DEFAULT_DENSITY, GLOBAL_TASK, StrategyConfig
from flora_train.config.schema import RunConfig
from flora_train.data.labels.spec import LabelSpec
from flora_train.federated.specs import client_spec, sparse_spec

StageName = Literal["sparse", "adapter", "full", "central"]


@dataclass(frozen=True)
class Stage:
    """Rounds that train one global adapter."""

    name: StageName
    spec: AdapterSpec
    """The global adapter."""
    algorithm: str
    """A key of `server_checks.ALGORITHMS`; `full` for full fine-tuning."""
    first_round: int
    rounds: int


def stages_of(config: RunConfig, run: str, labels: LabelSpec | None) -> list[Stage]:
    """The stages of one run of a strategy.

    Args:
        config: The whole configuration, with its section `federated`.
        run: A key of `FederatedConfig.runs`.
        labels: What the heads predict, without weights; None for texts.

    Returns:
        One stage, or the two of SLoRA.
    """
    federated = config.federated
    assert federated is not None
    name, seed = federated.runs[run]
    strategy = federated.strategies[name]
    entry = config.adapters[strategy.adapter]
    spec = make_spec(GLOBAL_TASK, run, entry, default_steps=local_steps_of(config, strategy), labels=labels)
    # Initial values and dropout are the same for all strategies that train this entry.
    spec = replace(spec, seeds_of=strategy.adapter)
    if strategy.central:
        algorithm = "full" if strategy.algorithm == "full" else "factor_mean"
        return [Stage("central", spec, algorithm, 0, 1)]
    if strategy.algorithm == "full":
        return [Stage("full", spec, "full", 0, federated.rounds)]
    if strategy.algorithm != "slora":
        return [Stage("adapter", spec, strategy.algorithm, 0, federated.rounds)]
    density = strategy.density or DEFAULT_DENSITY
    sparse = sparse_spec(spec, density=density, seed=seed, lr=strategy.sparse_lr)
    first = strategy.sparse_rounds or 0
    return [
        Stage("sparse", sparse, "product_mean", 0, first),
        Stage("adapter", spec, "product_mean", first, federated.rounds - first),
    ]


def local_steps_of(config: RunConfig, strategy: StrategyConfig) -> int:
    """The steps of a client in a round; with `central`, of all clients in all rounds."""
    federated = config.federated
    assert federated is not None
    if not strategy.central:
        return config.training.steps
    clients = federated.clients_per_round or federated.num_clients or DEFAULT_CLIENTS
    return config.training.steps * clients * federated.rounds


def client_specs(
    spec: AdapterSpec, clients: Sequence[str], ranks: Sequence[int] | None
) -> dict[str, AdapterSpec]:
    """Client -> its adapter. ranks: of the clients, which repeat; None: all have the global rank."""
    specs = {}
    for number, client in enumerate(clients):
        rank = None
        if ranks is not None and spec.method in ("lora", "flora"):
            rank = ranks[number % len(ranks)]
        specs[client] = client_spec(spec, client, rank)
    return specs
