"""Federated rounds on one machine: the clients of a round are adapters of one bank and train at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import isfinite

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.federated.bank_values import add_to_base, read_values, write_values
from flora_train.federated.local_training import Client, LocalResult, train_clients
from flora_train.federated.round_server import RoundAnswers, RoundServer
from flora_train.federated.rounds import RoundOptions, RoundRecord, ServerProgress
from flora_train.federated.state import GlobalState, expected_of, values_for
from flora_train.federated.updates import ClientUpdate, sort_updates
from flora_train.training.heldout import HeldOut
from flora_train.training.trainer import Trainer

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
        self.deliver = deliver
        self.after_step = after_step
        self.records: list[RoundRecord] = []
        """Of the rounds that this simulation ran."""
        self._check(clients)
        self.server = RoundServer(
            state,
            {client.name: self._spec(client.name) for client in clients},
            options=options,
            change_base=lambda residuals: add_to_base(self.bank, residuals),
            progress=progress,
        )

    @property
    def state(self) -> GlobalState:
        """The server's state after the last round."""
        return self.server.state

    @state.setter
    def state(self, state: GlobalState) -> None:
        self.server.state = state

    @property
    def progress(self) -> ServerProgress:
        """How far rounds have come."""
        return self.server.progress

    @property
    def options(self) -> RoundOptions:
        """How rounds are run."""
        return self.server.options

    def _check(self, clients: Sequence[Client]) -> None:
        if self.bank.pager is not None:
            raise user_error(
                "adapters.device_slots", None, "federated rounds need all adapters on the device"
            )
        if len(self.clients) < len(clients):
            raise user_error("clients", len(clients), "two clients have the same name")
        if len({client.adapter for client in clients}) < len(clients):
            raise user_error("clients", len(clients), "two clients have the same adapter")
        for client in clients:
            task = self._spec(client.name).task
            _check_examples(client, len(self.trainer.tasks[task].train))

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
        chosen = self.server.choose()
        sent = {name: self._broadcast(name) for name in chosen}
        results = self._train(chosen, number)
        answers = [self.deliver(self._update_of(name, results[name])) for name in chosen]
        expected = {name: expected_of(self.state, self._spec(name)) for name in chosen}
        arrived = [answer for answer in answers if answer is not None]
        accepted, outcomes = sort_updates(chosen, arrived, expected)
        record = self.server.finish(RoundAnswers(accepted, outcomes, sent, begun))
        self.records.append(record)
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


def _check_examples(client: Client, available: int) -> None:
    if not client.examples:
        raise user_error(client.name, None, "has no examples")
    outside = [example for example in client.examples if not 0 <= example < available]
    if outside:
        raise user_error(client.name, outside[0], f"its task has {available} training examples, from 0 on")
