"""The server of federated rounds: whom it chooses, and what it does with the answers that it can use."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError, user_error
from flora_train.federated.fedex import Residual
from flora_train.federated.rounds import RoundOptions, RoundRecord, ServerProgress, mean_loss
from flora_train.federated.server import Aggregation, aggregate
from flora_train.federated.server_checks import check_algorithm, check_client, check_ranks
from flora_train.federated.state import GlobalState
from flora_train.federated.updates import ClientOutcome, ClientUpdate, check_enough

logger = logging.getLogger(__name__)

NOT_FINITE = "the average has numbers that are not finite: a client sent values that are far too large"

ChangeBase = Callable[[Mapping[str, Residual]], None]
"""Adds residuals to the server's own base."""


@dataclass(frozen=True)
class RoundAnswers:
    """What came of the clients of a round, before the server's step."""

    accepted: Sequence[ClientUpdate]
    """In the order of the clients."""
    outcomes: Sequence[ClientOutcome]
    """One per client that was chosen, and of those that answered without being asked."""
    sent: Mapping[str, int]
    """Client -> bytes that it got."""
    begun: float
    """`time.monotonic` at the begin of the round."""


class RoundServer:
    """The server's state and its part of a round, the same for a simulation and for clients elsewhere.

    Args:
        state: From `initial_state` or an earlier stage.
        specs: Client -> its adapter.
        options: How rounds are run.
        change_base: Called with the residuals of every round, which may be empty.
        progress: Where earlier rounds ended. Default: before the first round.

    Raises:
        UserError: Fewer clients than asked for, or an algorithm that cannot average the method or the ranks.
    """

    def __init__(
        self,
        state: GlobalState,
        specs: Mapping[str, AdapterSpec],
        *,
        options: RoundOptions,
        change_base: ChangeBase,
        progress: ServerProgress | None = None,
    ) -> None:
        self.state, self.specs, self.options = state, specs, options
        self.change_base = change_base
        self.progress = progress or ServerProgress()
        for name in specs:
            self.progress.unseen.setdefault(name, 0)
        check_algorithm(options.algorithm, state.spec)
        check_ranks(options.algorithm, state)
        options.choose(specs, 0)
        for own in specs.values():
            check_client(options.algorithm, state.spec, own)

    def choose(self) -> list[str]:
        """The clients of the next round."""
        return self.options.choose(self.specs, self.progress.round)

    def finish(self, answers: RoundAnswers) -> RoundRecord:
        """End a round: average the usable updates, and count it.

        Args:
            answers: Of the clients of this round.

        Returns:
            The record of the round.

        Raises:
            UserError: More rounds than `failed_rounds` had too few usable updates.
        """
        trained = time.monotonic()
        outcomes = []
        for outcome in answers.outcomes:
            outcomes.append(replace(outcome, bytes_down=answers.sent.get(outcome.client, 0)))
        aggregation, failure = self._step(answers.accepted, outcomes)
        losses = [(own.loss, own.examples) for own in answers.accepted]
        record = RoundRecord(
            round=self.progress.round,
            outcomes=tuple(outcomes),
            loss=None if failure else mean_loss(losses),
            bytes_up=sum(outcome.bytes_up for outcome in outcomes),
            bytes_down=sum(outcome.bytes_down for outcome in outcomes),
            left_out=_largest(aggregation),
            seconds_clients=trained - answers.begun,
            seconds_server=time.monotonic() - trained,
            failure=failure,
        )
        self.progress.round += 1
        return record

    def _step(
        self, accepted: Sequence[ClientUpdate], outcomes: Sequence[ClientOutcome]
    ) -> tuple[Aggregation | None, str]:
        for outcome in outcomes:
            if outcome.status != "accepted":
                logger.warning(
                    f"round {self.progress.round}: {outcome.client} is {outcome.status}: {outcome.reason}"
                )
        try:
            check_enough(accepted, outcomes, self.options.min_clients)
        except UserError as error:
            return None, self._failed(error)
        aggregation = aggregate(self.state, accepted, self.options.algorithm)
        if problem := _not_finite(aggregation.state):
            return None, self._failed(user_error("updates", problem, NOT_FINITE))
        self.change_base(aggregation.state.residuals)
        self.state = aggregation.state
        for client in self.progress.unseen:
            self.progress.unseen[client] += self.state.residual_bytes
        return aggregation, ""

    def _failed(self, error: UserError) -> str:
        """Count a round that changes nothing; its reason. Raises the error if there are too many of them."""
        self.progress.failures += 1
        if self.progress.failures > self.options.failed_rounds:
            raise error
        return str(error)


def _not_finite(state: GlobalState) -> str | None:
    """The first parameter, or layer of the base, that has numbers that are not finite; None without any."""
    for name, tensor in state.values.tensors():
        if not torch.isfinite(tensor).all():
            return name
    for module, residual in state.residuals.items():
        if not all(torch.isfinite(tensor).all() for tensor in residual.tensors):
            return module
    return None


def _largest(aggregation: Aggregation | None) -> float | None:
    if aggregation is None or not aggregation.left_out:
        return None
    return max(aggregation.left_out.values())
