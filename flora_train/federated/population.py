"""The clients of a run: which training and held-out examples belong to each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flora_train.config.errors import user_error
from flora_train.config.federated_schema import DEFAULT_CLIENTS, GLOBAL_TASK, FederatedConfig
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.labels.split import label_numbers
from flora_train.data.splits import seed_of
from flora_train.data.task import Task
from flora_train.federated.client_splits import Indices, client_names, dirichlet_split, label_entropy

CENTRAL_CLIENT = "all"
"""The only client of a strategy with `central`."""


@dataclass(frozen=True)
class ClientData:
    """The examples of one client, whose task has its name."""

    name: str
    examples: tuple[int, ...]
    """Positions in the training split of its task."""
    heldout: tuple[int, ...]
    """Positions in the evaluated split of its task; may be empty."""


@dataclass(frozen=True)
class Population:
    """All clients of a run with one seed."""

    clients: tuple[ClientData, ...]
    tasks: Mapping[str, Task]
    """Client -> its task; and GLOBAL_TASK -> that of the global adapter: the task that all clients share, or
    the first one."""
    configs: Mapping[str, TaskConfig]
    """Of the same tasks."""
    shares_heldout: bool
    """Whether the held-out examples of all clients are those of one task."""
    label_entropy: float | None = None
    """The mean entropy of a client's labels in nats, where examples are divided by label."""

    @property
    def heldout_positions(self) -> dict[str, tuple[int, ...]]:
        """Client -> positions of its held-out examples in the scores of `StrategyRun.scores`."""
        positions: dict[str, tuple[int, ...]] = {}
        begin = 0
        for client in self.clients:
            if self.shares_heldout:
                positions[client.name] = client.heldout
                continue
            positions[client.name] = tuple(range(begin, begin + len(client.heldout)))
            begin += len(client.heldout)
        return positions

    def centralised(self) -> Population:
        """A population with one client that has all examples."""
        task = self.tasks[GLOBAL_TASK]
        everything = tuple(range(len(task.train)))
        client = ClientData(CENTRAL_CLIENT, everything, tuple(range(len(task.evaluated))))
        config = self.configs[GLOBAL_TASK]
        return Population(
            (client,),
            {CENTRAL_CLIENT: replace(task, name=CENTRAL_CLIENT), GLOBAL_TASK: task},
            {CENTRAL_CLIENT: config, GLOBAL_TASK: config},
            shares_heldout=True,
        )


def make_population(config: RunConfig, tasks: Mapping[str, Task], seed: int) -> Population:
    """The clients of a run.

    Args:
        config: The run, with its section `federated`.
        tasks: Its loaded tasks.
        seed: Decides on the division of the examples. Which tasks are clients depends on the run's seed, so
            that all seeds of a strategy have the same held-out examples.

    Returns:
        The clients, with their tasks.

    Raises:
        UserError: There are too few examples, or tasks, for the clients, or labels differ between tasks.
    """
    assert config.federated is not None
    if config.federated.split == "tasks":
        return _of_tasks(config, tasks)
    return _divided(config, config.federated, tasks, seed)


def names_of_clients(config: RunConfig) -> list[str]:
    """The names of all clients, in their order. Raises UserError for more clients than tasks."""
    federated = config.federated
    assert federated is not None
    if federated.split == "dirichlet":
        return client_names(federated.num_clients or DEFAULT_CLIENTS)
    names = sorted(config.tasks)
    count = federated.num_clients or len(names)
    if count > len(names):
        hint = f"there are {len(names)} tasks, each of which is a client: ask for at most so many"
        raise user_error("federated.num_clients", count, hint)
    generator = np.random.default_rng(seed_of(config.seed, "natural split"))
    return [names[i] for i in np.sort(generator.choice(len(names), count, replace=False))]


def _of_tasks(config: RunConfig, tasks: Mapping[str, Task]) -> Population:
    chosen = names_of_clients(config)
    first = tasks[chosen[0]]
    for name in chosen:
        own = tasks[name]
        if own.labels != first.labels:
            hint = f"are not those of {first.name}: list the same labels, in the same order, for all tasks"
            raise user_error(f"tasks.{name}.labels", own.labels, hint)
        if not len(own.train):
            raise user_error(f"tasks.{name}", None, "has no training examples: a client needs some")
    clients = []
    for name in chosen:
        own = tasks[name]
        examples, heldout = tuple(range(len(own.train))), tuple(range(len(own.evaluated)))
        clients.append(ClientData(name, examples, heldout))
    own_tasks = {name: tasks[name] for name in chosen}
    return Population(
        tuple(clients),
        {**own_tasks, GLOBAL_TASK: replace(first, name=GLOBAL_TASK)},
        {**{name: config.tasks[name] for name in chosen}, GLOBAL_TASK: config.tasks[first.name]},
        shares_heldout=False,
    )


def _divided(
    config: RunConfig, federated: FederatedConfig, tasks: Mapping[str, Task], seed: int
) -> Population:
    ((name, task),) = tasks.items()
    labels = label_numbers(task.train)
    names = names_of_clients(config)
    assert federated.dirichlet_alpha is not None
    parts = dirichlet_split(labels, len(names), alpha=federated.dirichlet_alpha, seed=seed)
    heldout = heldout_parts(labels, parts, label_numbers(task.evaluated), seed=seed)
    clients = []
    for client, own, own_heldout in zip(names, parts, heldout, strict=True):
        clients.append(ClientData(client, tuple(map(int, own)), tuple(map(int, own_heldout))))
    with_global = [*names, GLOBAL_TASK]
    return Population(
        tuple(clients),
        {client: replace(task, name=client) for client in with_global},
        dict.fromkeys(with_global, config.tasks[name]),
        shares_heldout=True,
        label_entropy=label_entropy(labels, parts),
    )


def heldout_parts(
    labels: Indices, parts: Sequence[Indices], heldout_labels: Indices, *, seed: int
) -> list[Indices]:
    """Divide held-out examples among clients, each label by the clients' shares of its training examples.

    Args:
        labels: int64 [n], the label of each training example.
        parts: The training examples of each client.
        heldout_labels: int64 [m].
        seed: Seed of the order.

    Returns:
        For each client the positions of its held-out examples, rising; a client may have none. Examples of
        labels that no client has belong to no client.
    """
    generator = np.random.default_rng(seed_of(seed, "held-out parts"))
    found: list[list[Indices]] = [[] for _ in parts]
    for label in np.unique(heldout_labels):
        members = generator.permutation(np.flatnonzero(heldout_labels == label))
        counts = np.array([np.count_nonzero(labels[part] == label) for part in parts], dtype=np.float64)
        if not counts.sum():
            continue
        cuts = np.rint((counts / counts.sum()).cumsum()[:-1] * len(members)).astype(np.int64)
        for own, piece in zip(found, np.split(members, cuts), strict=True):
            own.append(piece)
    empty = np.zeros(0, dtype=np.int64)
    return [np.sort(np.concatenate([empty, *own])) for own in found]
