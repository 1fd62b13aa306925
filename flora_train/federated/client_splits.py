"""How examples are divided among clients: by label with Dirichlet shares, or as they were collected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import user_error
from flora_train.data.splits import seed_of

MOST_ATTEMPTS = 200
"""Draws of shares until every client has examples."""

Indices = NDArray[np.int64]


def client_names(count: int) -> list[str]:
    """client_0, client_1, ..., with as many digits as the largest needs, so that they sort as they count."""
    digits = len(str(count - 1))
    return [f"client_{number:0{digits}}" for number in range(count)]


def dirichlet_split(
    labels: Sequence[int] | NDArray[np.int64], clients: int, *, alpha: float, seed: int, least: int = 1
) -> list[Indices]:
    """Divide examples among clients, each label by shares of its own: Dirichlet(alpha, ..., alpha).

    A small alpha gives a label to few clients; a large one gives all clients the same labels. Source: Hsu et
    al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019.

    Args:
        labels: int [n], the label of each example.
        clients: Number of clients.
        alpha: Above 0.
        seed: Seed of shares and order.
        least: Examples that every client must have. Shares are drawn again until this is so.

    Returns:
        For each client the int64 indices of its examples, rising. Every example is one client's.

    Raises:
        UserError: There are fewer examples than the clients need, or in many draws a client had too few.
    """
    found = np.asarray(labels)
    if not (np.isfinite(alpha) and alpha > 0):
        raise user_error("federated.dirichlet_alpha", alpha, "must be above 0, such as 0.1")
    if not 1 <= clients * least <= len(found):
        hint = f"there are {len(found)} examples for clients of at least {least}: use fewer clients"
        raise user_error("federated.num_clients", clients, hint)
    for attempt in range(MOST_ATTEMPTS):
        generator = np.random.default_rng(seed_of(seed, "dirichlet split", str(attempt)))
        parts = _draw(found, clients, alpha, generator)
        if min(map(len, parts)) >= least:
            return parts
    hint = (
        f"in {MOST_ATTEMPTS} draws some of {clients} clients had fewer than {least} of {len(found)} "
        "examples: use fewer clients or a larger alpha"
    )
    raise user_error("federated.dirichlet_alpha", alpha, hint)


def _draw(
    labels: NDArray[np.int64], clients: int, alpha: float, generator: np.random.Generator
) -> list[Indices]:
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(clients, alpha))
        cuts = np.rint(shares.cumsum()[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def natural_split(
    owners: Sequence[str], clients: int | None = None, *, seed: int = 0, least: int = 1
) -> dict[str, Indices]:
    """Divide examples as they were collected: by the column that names each example's client.

    Args:
        owners: The client of each example.
        clients: Number of clients, chosen by the seed among those that have enough examples. Default: all.
        seed: Seed of that choice.
        least: Examples that a client must have.

    Returns:
        Client, sorted by name -> the int64 indices of its examples, rising.

    Raises:
        UserError: An example has no client, or fewer clients than asked for have enough examples.
    """
    members: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        if not owner:
            raise user_error("owners", None, f"example {index} has no client")
        members.setdefault(str(owner), []).append(index)
    enough = sorted(name for name, found in members.items() if len(found) >= least)
    count = len(enough) if clients is None else clients
    if not 1 <= count <= len(enough):
        hint = f"{len(enough)} clients have at least {least} examples: ask for 1 to {len(enough)}"
        raise user_error("federated.num_clients", clients, hint)
    generator = np.random.default_rng(seed_of(seed, "natural split"))
    chosen = np.sort(generator.choice(len(enough), count, replace=False))
    return {enough[i]: np.array(members[enough[i]], dtype=np.int64) for i in chosen}


def label_entropy(labels: Sequence[int] | NDArray[np.int64], parts: Sequence[Indices]) -> float:
    """How alike the clients' labels are: the mean entropy of a client's labels, in nats."""
    found = np.asarray(labels)
    entropies = []
    for part in parts:
        _, counts = np.unique(found[part], return_counts=True)
        shares = counts / counts.sum()
        entropies.append(float(-(shares * np.log(shares)).sum()))
    return float(np.mean(entropies))
