"""Federated rounds on one machine: the clients of a round are adapters of one bank and train at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError, user_error
from flora_train.federated.bank_values import add_to_base, read_values, write_values
from flora_train.federated.local_training import Client, LocalResult, train_clients
from flora_train.federated.rounds import RoundOptions, RoundRecord, ServerProgress, mean_loss
from flora_train.federated.server import Aggregation, aggregate
from flora_train.federated.server_checks import check_algorithm, check_client, check_ranks
from flora_train.federated.state import GlobalState, expected_of, values_for
from flora_train.federated.updates import ClientOutcome, ClientUpdate, check_enough, sort_updates
from flora_train.training.heldout import HeldOut
from flora_train.training.trainer import Trainer

logger = logging.getLogger(__name__)

Deliver = Callable[[ClientUpdate], ClientUpdate | None]
"""What the server gets of an update that a client sent; None: nothing."""


class Simulation:
    """Rounds of federated training in one bank.

    Args:
        trainer: Its bank has an adapter for every client; it has no paging.
        clients: All clients, with different names and adapters.
        state: The server's state, from `initial_state` or an earlier stage.
        options: How rounds are run.
        deliver: Stands for the network. Default: all updates arrive as they were sent.
        progress: Where an earlier simulation ended. Default: before the first round.
        after_step: Called after every local step; it may raise an exception to stop.

    Raises:
        UserError: Fewer clients than asked for, an algorithm that cannot average the method or the ranks, a
            client without examples, or a bank with paging.
    """

    def __init__(
        self,
        trainer: Trainer,
        clients: Sequence[Client],
        state: GlobalState,
        *,
        options: RoundOptions,
        deliver: Deliver = lambda update: update,
        progress: ServerProgress | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.trainer, self.bank = trainer, trainer.bank
        self.clients = {client.name: client for client in clients}
        self.state = state
        self.options = options
        self.deliver = deliver
        self.after_step = after_step
        self.records: list[RoundRecord] = []
        """Of the rounds that this simulation ran."""
        self.progress = progress or ServerProgress()
        for name in self.clients:
            self.progress.unseen.setdefault(name, 0)
        self._check(clients)

    def _check(self, clients: Sequence[Client]) -> None:
        if self.bank.pager is not None:
            raise user_error(
                "adapters.device_slots", None, "federated rounds need all adapters on the device"
            )
        if len(self.clients) < len(clients):
            raise user_error("clients", len(clients), "two clients have the same name")
        if len({client.adapter for client in clients}) < len(clients):
            raise user_error("clients", len(clients), "two clients have the same adapter")
        check_algorithm(self.options.algorithm, self.state.spec)
        check_ranks(self.options.algorithm, self.state)
        self.options.choose(self.clients, 0)
        for client in clients:
            spec = self._spec(client.name)
            check_client(self.options.algorithm, self.state.spec, spec)
            _check_examples(client, len(self.trainer.tasks[spec.task].train))

    def run(self, rounds: int) -> list[RoundRecord]:
        """Run further rounds.

        Args:
            rounds: Their number.

        Returns:
            Their records.

        Raises:
            UserError: More rounds than `failed_rounds` had too few usable updates.
        """
        return [self.round() for _ in range(rounds)]

    def round(self) -> RoundRecord:
        """Run one round: broadcast, local steps, server step. Raises UserError as `run` does."""
        number, begun = self.progress.round, time.monotonic()
        chosen = self.options.choose(self.clients, number)
        sent = {name: self._broadcast(name) for name in chosen}
        results = self._train(chosen, number)
        answers = [self.deliver(self._update_of(name, results[name])) for name in chosen]
        expected = {name: expected_of(self.state, self._spec(name)) for name in chosen}
        trained = time.monotonic()
        arrived = [answer for answer in answers if answer is not None]
        accepted, outcomes = sort_updates(chosen, arrived, expected)
        outcomes = [replace(outcome, bytes_down=sent.get(outcome.client, 0)) for outcome in outcomes]
        aggregation, failure = self._server_step(accepted, outcomes)
        record = RoundRecord(
            round=number,
            outcomes=tuple(outcomes),
            loss=None if failure else mean_loss([(own.loss, own.examples) for own in accepted]),
            bytes_up=sum(outcome.bytes_up for outcome in outcomes),
            bytes_down=sum(outcome.bytes_down for outcome in outcomes),
            left_out=_largest(aggregation),
            seconds_clients=trained - begun,
            seconds_server=time.monotonic() - trained,
            failure=failure,
        )
        self.records.append(record)
        self.progress.round += 1
        return record

    def load_global(self, adapter: str) -> None:
        """Write the global values into an adapter of the bank, to evaluate or export them."""
        spec = self.bank.specs[self.bank.id_of(adapter)]
        write_values(self.bank, adapter, values_for(self.state, spec))

    def heldout(self, max_examples: int | None = None) -> dict[str, HeldOut]:
        """What the global adapter achieves on the held-out examples of each client's task.

        Args:
            max_examples: Limit per task. Default: all.

        Returns:
            Task -> results. The clients' adapters hold the global values afterwards.
        """
        for client in self.clients.values():
            self.load_global(client.adapter)
        return self.trainer.heldout(max_examples, lambda share: None)

    def _spec(self, client: str) -> AdapterSpec:
        return self.bank.specs[self.bank.id_of(self.clients[client].adapter)]

    def _broadcast(self, client: str) -> int:
        """Write the global values into the client's row; the bytes that it gets."""
        values = values_for(self.state, self._spec(client))
        write_values(self.bank, self.clients[client].adapter, values)
        unseen, self.progress.unseen[client] = self.progress.unseen[client], 0
        return values.nbytes + unseen

    def _train(self, chosen: Sequence[str], number: int) -> dict[str, LocalResult]:
        results: dict[str, LocalResult] = {}
        at_once = self.options.clients_at_once or len(chosen)
        for start in range(0, len(chosen), at_once):
            group = [self.clients[name] for name in chosen[start : start + at_once]]
            results |= train_clients(
                self.trainer,
                group,
                self.options.local,
                round_number=number,
                seed=self.options.seed,
                after_step=self.after_step,
            )
        return results

    def _update_of(self, client: str, result: LocalResult) -> ClientUpdate:
        return ClientUpdate(
            client,
            self._spec(client),
            examples=len(self.clients[client].examples),
            values=read_values(self.bank, self.clients[client].adapter),
            base=self.state.base,
            mask=self.state.mask,
            loss=result.loss if isfinite(result.loss) else None,
            failure=result.failure or "",
        )

    def _server_step(
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
            self.progress.failures += 1
            if self.progress.failures > self.options.failed_rounds:
                raise
            return None, str(error)
        aggregation = aggregate(self.state, accepted, self.options.algorithm)
        add_to_base(self.bank, aggregation.state.residuals)
        self.state = aggregation.state
        for client in self.progress.unseen:
            self.progress.unseen[client] += self.state.residual_bytes
        return aggregation, ""


def _check_examples(client: Client, available: int) -> None:
    if not client.examples:
        raise user_error(client.name, None, "has no examples")
    outside = [example for example in client.examples if not 0 <= example < available]
    if outside:
        raise user_error(client.name, outside[0], f"its task has {available} training examples, from 0 on")


def _largest(aggregation: Aggregation | None) -> float | None:
    if aggregation is None or not aggregation.left_out:
        return None
    return max(aggregation.left_out.values())
