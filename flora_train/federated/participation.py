"""Which clients take part in a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flora_train.config.errors import user_error
from flora_train.data.splits import seed_of


def choose_clients(clients: Sequence[str], count: int, *, seed: int, round_number: int) -> list[str]:
    """The clients of one round, without repetition, in the order of `clients`.

    Args:
        clients: Names of all clients.
        count: Clients of a round.
        seed: Seed of the choice.
        round_number: The round, from 0: each round has its own choice, whatever was chosen before.

    Returns:
        `count` names.

    Raises:
        UserError: There are fewer clients than asked for, or none is asked for.
    """
    if not 1 <= count <= len(clients):
        hint = f"there are {len(clients)} clients: ask for 1 to {len(clients)} in a round"
        raise user_error("federated.clients_per_round", count, hint)
    generator = np.random.default_rng(seed_of(seed, "participation", str(round_number)))
    chosen = np.sort(generator.choice(len(clients), count, replace=False))
    return [clients[i] for i in chosen]
