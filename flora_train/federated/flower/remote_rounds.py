"""Rounds whose clients are nodes of Flower."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.federated.bank_values import adapted_weights, add_to_base, write_values
from flora_train.federated.flower.base_history import BaseHistory, Residuals
from flora_train.federated.flower.nodes import Nodes, Replies
from flora_train.federated.flower.recipe_digest import check_same, digests_of
from flora_train.federated.flower.records import (
    FACTS,
    VALUES,
    array_record,
    bytes_in,
    unpacked,
)
from flora_train.federated.loaded import LoadedRun
from flora_train.federated.population import Population
from flora_train.federated.remote import Answer, broadcast_to, collect_answers, told
from flora_train.federated.round_server import RoundAnswers, RoundServer
from flora_train.federated.rounds import RoundOptions, RoundRecord, ServerProgress
from flora_train.federated.stages import Stage
from flora_train.federated.state import GlobalState, expected_of, values_for
from flora_train.federated.strategy_run import AdapterRounds, RoundEngine
from flora_train.federated.updates import ClientOutcome


@dataclass(frozen=True)
class Limits:
    """How long the server waits for clients, in seconds."""

    answers: float
    """For the answers of a round."""
    connected: float
    """For the clients of a round to be connected."""


class RemoteRounds:
    """The rounds of one stage.

    Args:
        server: With the state before them.
        nodes: The clients.
        bank: The server's own, to evaluate and export the global adapter.
        history: Of the base.
        facts: Sent with every round, beside its number.
        limits: Of time.
        known_examples: Client -> the number of its examples, where the server has the data.
    """

    def __init__(
        self,
        server: RoundServer,
        nodes: Nodes,
        bank: AdapterBank,
        *,
        history: BaseHistory,
        facts: dict[str, str | list[str]],
        limits: Limits,
        known_examples: Mapping[str, int],
    ) -> None:
        self.server, self.nodes, self.bank = server, nodes, bank
        self.history, self.facts, self.limits = history, facts, limits
        self.known_examples = known_examples

    @property
    def state(self) -> GlobalState:
        """The server's state after the last round."""
        return self.server.state

    @property
    def progress(self) -> ServerProgress:
        """How far rounds have come."""
        return self.server.progress

    def round(self) -> RoundRecord:
        """Run one round, once enough of its clients are connected or the limit for that is over. Raises
        UserError if more rounds failed than `failed_rounds`."""
        chosen = self.server.choose()
        self.nodes.wait_for(chosen, self.server.options.min_clients, self.limits.connected)
        begun, number = time.monotonic(), self.progress.round
        online, contents, sizes = self.nodes.online(), {}, {}
        for client in chosen:
            if client in online:
                content, sizes[client] = self._content(client, online[client])
                contents[client] = (online[client], content)
        replies = self.nodes.ask(contents, round_number=number, timeout=self.limits.answers)
        for client in chosen:
            if client not in online:
                replies.silent[client] = "no node of it is connected"
        sent = {client: size for client, size in sizes.items() if client in replies.sent}
        self.progress.unseen |= dict.fromkeys(sent, 0)
        answers, failed = self._read(replies)
        accepted, outcomes = collect_answers(
            chosen,
            answers,
            self.server.specs,
            self.state,
            failed=failed,
            known_examples=self.known_examples,
        )
        for outcome in outcomes:
            self._note_base(outcome, online)
        return self.server.finish(RoundAnswers(accepted, outcomes, sent, begun))

    def load_global(self, adapter: str) -> None:
        """Write the global values into an adapter of the server's bank."""
        spec = self.bank.specs[self.bank.id_of(adapter)]
        write_values(self.bank, adapter, values_for(self.state, spec))

    def _content(self, client: str, node: int) -> tuple[RecordDict, int]:
        """The message of a client, and the bytes of its arrays."""
        arrays = broadcast_to(self.state, self.server.specs[client])
        records, more = self.history.records_for(node)
        facts = ConfigRecord({**self.facts, "round": self.progress.round, "client": client})
        content = RecordDict({VALUES: array_record(arrays), FACTS: facts, **records})
        return content, more + sum(array.nbytes for array in arrays)

    def _read(self, replies: Replies) -> tuple[dict[str, Answer], dict[str, ClientOutcome]]:
        answers, failed = {}, {}
        for client, content in replies.contents.items():
            expected = expected_of(self.state, self.server.specs[client])
            try:
                answer = unpacked(content, expected.shapes)
                check_same(answer.facts, self.facts, "the client")
                answers[client] = answer
                continue
            except UserError as error:
                reason = told(error)
            except Exception as error:  # whatever a client sends, the round goes on with the others
                reason = f"its answer cannot be read ({type(error).__name__})"
            failed[client] = ClientOutcome(client, "excluded", reason, bytes_up=bytes_in(content))
        for client, reason in replies.errors.items():
            failed[client] = ClientOutcome(client, "excluded", reason)
        for client, reason in replies.silent.items():
            failed[client] = ClientOutcome(client, "absent", reason)
        return answers, failed

    def _note_base(self, outcome: ClientOutcome, online: dict[str, int]) -> None:
        node = online.get(outcome.client)
        if node is None or outcome.status == "absent":
            return
        if outcome.status == "accepted":
            self.history.followed(node)
        else:
            self.history.forget(node)


class FlowerRounds(AdapterRounds):
    """A strategy whose clients are nodes of Flower: one stage, or the two of SLoRA.

    Args:
        loaded: Data and base of the server.
        population: The clients.
        options: How rounds are run.
        stages: What is trained.
        nodes: The clients' nodes.
        limits: Of time.
        server_data: Whether the server has the clients' examples.
    """

    def __init__(
        self,
        loaded: LoadedRun,
        population: Population,
        options: RoundOptions,
        stages: list[Stage],
        *,
        nodes: Nodes,
        limits: Limits,
        server_data: bool,
    ) -> None:
        self.nodes, self.limits = nodes, limits
        self.known_examples: dict[str, int] = {}
        if server_data:
            self.known_examples = {own.name: len(own.examples) for own in population.clients}
        self._digests = digests_of(loaded.config, loaded.tasks if server_data else {})
        super().__init__(loaded, population, options, stages)

    def _make_engine(self, state: GlobalState, progress: ServerProgress) -> RoundEngine:
        bank, pool = self.trainer.bank, self._pool()
        history = BaseHistory(self.loaded.base, [state.base], lambda: adapted_weights(bank, pool))

        def change_base(residuals: Residuals) -> None:
            add_to_base(bank, residuals)
            history.add(residuals)

        server = RoundServer(
            state, self._specs, options=self._stage_options, change_base=change_base, progress=progress
        )
        facts: dict[str, str | list[str]] = {"stage": self.stage.name, **self._digests}
        if self.loaded.labels is not None:
            facts["labels"] = list(self.loaded.labels.labels)
        return RemoteRounds(
            server,
            self.nodes,
            bank,
            history=history,
            facts=facts,
            limits=self.limits,
            known_examples=self.known_examples,
        )
