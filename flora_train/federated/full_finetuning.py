"""Federated full fine-tuning, to compare with: every weight of the base is trained and travels.

Clients cannot share forward passes, because each has weights of its own. They run one after the other from
one state, and the time of a round is the sum of theirs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from flora_train.config.errors import user_error
from flora_train.federated.bank_values import read_values, write_values
from flora_train.federated.base_training import BaseTraining, load_base
from flora_train.federated.local_training import Client, LocalResult
from flora_train.federated.rounds import RoundOptions, RoundRecord, mean_loss
from flora_train.federated.updates import ClientOutcome
from flora_train.training.trainer import Trainer


class FullFineTuning:
    """Rounds in which each client trains the whole base, and FedAvg averages the weights, by examples.

    Between rounds the base of the bank is the global one, and `head` the global head.

    Args:
        trainer: Its bank has an adapter of method `head` for every client, whose rates, decay and clip norm
            count for the base, too.
        clients: All clients.
        options: Rounds. Their algorithm and clients_at_once do not count.
        first_round: Number of the first round of this object.
        failures: Rounds before it that changed nothing.
        after_step: Called after every local step; it may raise an exception to stop.

    Raises:
        UserError: An adapter is not of method head, or there are fewer clients than asked for.
    """

    def __init__(
        self,
        trainer: Trainer,
        clients: Sequence[Client],
        options: RoundOptions,
        *,
        first_round: int = 0,
        failures: int = 0,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.first_round, self.failures, self.after_step = first_round, failures, after_step
        self.trainer, self.bank, self.options = trainer, trainer.bank, options
        self.clients = {client.name: client for client in clients}
        for client in clients:
            method = self.bank.specs[self.bank.id_of(client.adapter)].method
            if method != "head":
                raise user_error(client.adapter, method, "full fine-tuning needs adapters of method head")
        options.choose(self.clients, 0)
        self.head = read_values(self.bank, clients[0].adapter)
        self.records: list[RoundRecord] = []
        self.changed: set[str] = set()
        """Parameters of the base that are averages of clients."""

    def round(self) -> RoundRecord:
        """Run one round.

        Returns:
            Its record. Bytes are those of the weights that got a gradient, and of the head.

        Raises:
            UserError: More rounds than `failed_rounds` had fewer clients than `min_clients` whose weights can
                be used. The model is then as before the round.
        """
        number, begun = self.first_round + len(self.records), time.monotonic()
        start = {name: own.detach().clone() for name, own in self.trainer.model.named_parameters()}
        average = _Average(start)
        outcomes: list[ClientOutcome] = []
        for name in self.options.choose(self.clients, number):
            client = self.clients[name]
            write_values(self.bank, client.adapter, self.head)
            training = BaseTraining(self.trainer, client, self.after_step)
            result = training.run(self.options.local, round_number=number, seed=self.options.seed)
            values = training.values()
            outcomes.append(_outcome(client, result, values))
            if outcomes[-1].status == "accepted":
                average.add(values, len(client.examples))
            load_base(self.trainer.model, start)
        trained = time.monotonic()
        failure = self._finish(average, outcomes)
        accepted = [outcome for outcome in outcomes if outcome.status == "accepted"]
        record = RoundRecord(
            round=number,
            outcomes=tuple(outcomes),
            loss=None if failure else mean_loss([(own.loss, own.examples) for own in accepted]),
            bytes_up=sum(outcome.bytes_up for outcome in outcomes),
            bytes_down=sum(outcome.bytes_down for outcome in outcomes),
            left_out=None,
            seconds_clients=trained - begun,
            seconds_server=time.monotonic() - trained,
            failure=failure,
        )
        self.records.append(record)
        return record

    def load_global_head(self, adapter: str) -> None:
        """Write the global head into an adapter of the bank, to evaluate it on the global base."""
        write_values(self.bank, adapter, self.head)

    def _finish(self, average: _Average, outcomes: Sequence[ClientOutcome]) -> str:
        """The averages become the base and the head. Returns why they do not; empty if they do."""
        accepted = sum(outcome.status == "accepted" for outcome in outcomes)
        if accepted < max(1, self.options.min_clients):
            reasons = [f"{outcome.client}: {outcome.reason}" for outcome in outcomes if outcome.reason]
            hint = (
                f"{accepted} of {len(outcomes)} clients have weights that can be used: {'; '.join(reasons)}"
            )
            error = user_error("federated.min_clients", self.options.min_clients, hint)
            self.failures += 1
            if self.failures > self.options.failed_rounds:
                raise error
            return str(error)
        means = average.means()
        load_base(self.trainer.model, means)
        self.changed |= means.keys() & average.start.keys()
        self.head = self.head.map(lambda name, tensor: means[name].to(tensor))
        return ""


class _Average:
    """The mean of the clients' values, by examples. A client that did not train a parameter of the base
    counts with the value that it began with."""

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self.start = start
        self._sums: dict[str, Tensor] = {}
        self._examples: Counter[str] = Counter()
        self._total = 0

    def add(self, values: Mapping[str, Tensor], examples: int) -> None:
        """Add a client's values, in float64."""
        self._total += examples
        for name, tensor in values.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(tensor, dtype=torch.float64)
            self._sums[name].add_(tensor.double(), alpha=examples)
            self._examples[name] += examples

    def means(self) -> dict[str, Tensor]:
        """Name -> mean, float64, of everything that some client trained."""
        means = {}
        for name, total in self._sums.items():
            untrained = self._total - self._examples[name]
            if untrained:
                total = total + untrained * self.start[name].double()
            means[name] = total / self._total
        return means


def _outcome(client: Client, result: LocalResult, values: Mapping[str, Tensor]) -> ClientOutcome:
    reason = result.failure
    for name, tensor in values.items():
        if reason is None and not torch.isfinite(tensor).all():
            reason = f"{name} has numbers that are not finite"
    size = sum(tensor.nbytes for tensor in values.values())
    return ClientOutcome(
        client.name,
        "accepted" if reason is None else "excluded",
        reason or "",
        examples=len(client.examples),
        loss=result.loss if isfinite(result.loss) else None,
        bytes_up=size,
        bytes_down=size,
    )
