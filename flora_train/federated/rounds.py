"""How rounds are run, and what happened in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flora_train.config.errors import user_error
from flora_train.federated.local_training import LocalSteps
from flora_train.federated.participation import choose_clients
from flora_train.federated.updates import ClientOutcome


@dataclass(frozen=True)
class RoundOptions:
    """How rounds are run."""

    algorithm: str = "product_mean"
    """A key of `server.ALGORITHMS`."""
    clients_per_round: int | None = None
    """Default: all clients."""
    local: LocalSteps = field(default_factory=LocalSteps)
    seed: int = 0
    """Of participation and of the order of each client's examples."""
    clients_at_once: int | None = None
    """Clients that share forward passes. Default: all of a round."""
    min_clients: int = 1
    """Usable updates that a round needs. With fewer, it changes nothing."""
    failed_rounds: int = 0
    """Rounds that may fail so before the simulation stops with an error."""

    def __post_init__(self) -> None:
        for key, value, least in (
            ("clients_at_once", self.clients_at_once, 1),
            ("min_clients", self.min_clients, 1),
            ("failed_rounds", self.failed_rounds, 0),
        ):
            if value is not None and value < least:
                raise user_error(f"federated.{key}", value, f"must be at least {least}")

    def choose(self, clients: Iterable[str], round_number: int) -> list[str]:
        """The clients of one round. Raises UserError if there are fewer than asked for."""
        names = list(clients)
        count = len(names) if self.clients_per_round is None else self.clients_per_round
        chosen = choose_clients(names, count, seed=self.seed, round_number=round_number)
        if len(chosen) < self.min_clients:
            hint = f"a round has {len(chosen)} clients: ask for at most so many usable updates"
            raise user_error("federated.min_clients", self.min_clients, hint)
        return chosen


@dataclass
class ServerProgress:
    """How far rounds have come, beside the global adapter: what a resumed run needs."""

    round: int = 0
    """The next round, from 0."""
    failures: int = 0
    """Rounds that changed nothing."""
    unseen: dict[str, int] = field(default_factory=dict)
    """Client -> bytes of residuals since it last took part, which it gets with the next values."""


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round."""

    round: int
    outcomes: tuple[ClientOutcome, ...]
    """One per client that was chosen."""
    loss: float | None
    """Mean training loss of the accepted clients, by examples; None for a round that failed."""
    bytes_up: int
    bytes_down: int
    left_out: float | None
    """The largest share of a layer's mean that the rank left out; None where nothing is fitted."""
    seconds_clients: float
    seconds_server: float
    failure: str = ""
    """Why the round changed nothing."""


def mean_loss(losses: Sequence[tuple[float | None, int]]) -> float | None:
    """The mean by examples of (loss, examples), without those of None; None if there is no other."""
    known = [(loss, examples) for loss, examples in losses if loss is not None]
    if not known:
        return None
    return sum(loss * examples for loss, examples in known) / sum(examples for _, examples in known)
