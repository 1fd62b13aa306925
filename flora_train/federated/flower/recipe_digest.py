"""Digests by which a server and its nodes find that their recipes or their examples differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from flora_train.config.errors import user_error
from flora_train.config.json_format import JsonValue
from flora_train.config.schema import RunConfig
from flora_train.data.task import Task
from flora_train.runtime.config_changes import comparable
from flora_train.training.origin import data_of

RECIPE, DATA = "recipe", "data"
"""Names of the digests among the facts of messages."""
HINTS: Mapping[str, str] = {
    RECIPE: (
        "the recipes differ in adapters, federated, training, seed or a task: give the server and all nodes "
        "the same one"
    ),
    DATA: (
        "the examples differ, or the tokenizer: with federated.split=dirichlet the server and all nodes have "
        "the same file"
    ),
}
SOURCES = ("train", "validation", "test")
"""Keys of a task that say where its rows are, which may be elsewhere on each machine."""
OF_ONE_MACHINE = (
    "audio",
    "evaluation",
    "kernels",
    "model",
    "name",
    "federated.clients_at_once",
    "training.log_every",
    "training.save_every",
    "training.tokens_per_microbatch",
)
"""Sections and keys that may differ between machines. The base itself is compared by its fingerprint."""


def digests_of(config: RunConfig, tasks: Mapping[str, Task]) -> dict[str, str]:
    """The digests that the server and its nodes compare.

    Args:
        config: Resolved, with all tasks.
        tasks: The loaded ones; none where there are no examples.

    Returns:
        RECIPE -> digest; and, where the examples of all clients are in one task that is loaded,
        DATA -> digest.
    """
    digests = {RECIPE: _digest(shared_keys(config))}
    assert config.federated is not None
    if tasks and config.federated.split == "dirichlet":
        ((_, task),) = tasks.items()
        digests[DATA] = _digest(data_of(task).model_dump(mode="json", exclude_none=True))
    return digests


def shared_keys(config: RunConfig) -> dict[str, JsonValue]:
    """Dotted key -> value, of all keys that must be the same on the server and on every node."""
    return {key: value for key, value in comparable(config).items() if not _is_of_one_machine(key)}


def check_same(stated: Mapping[str, Any], expected: Mapping[str, Any], side: str) -> None:
    """Compare the digests that the server knows with those of a client.

    Args:
        stated: Facts of the client.
        expected: Facts of the server.
        side: Whose digests `stated` are, for the error.

    Raises:
        UserError: A digest differs or is missing; it says whether that of the recipe or of the data.
    """
    for name in (RECIPE, DATA):
        own, others = stated.get(name), expected.get(name)
        if name in expected and own != others:
            found = f"{side} has {_short(own)}, the server {_short(others)}"
            raise user_error(name, None, f"{HINTS[name]} ({found})")


def _is_of_one_machine(key: str) -> bool:
    section, _, rest = key.partition(".")
    if section == "tasks":
        return rest.partition(".")[2].partition(".")[0] in SOURCES
    return section in OF_ONE_MACHINE or key in OF_ONE_MACHINE


def _digest(content: Mapping[str, JsonValue]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _short(digest: object) -> str:
    return "none" if digest is None else str(digest)[:12]
