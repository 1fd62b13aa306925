"""Rounds whose clients are nodes of Flower."""

from __future__ import annotations

import time

from flwr.app import ConfigRecord, RecordDict

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.federated.bank_values import adapted_weights, add_to_base, write_values
from flora_train.federated.flower.base_history import BaseHistory, Residuals
from flora_train.federated.flower.nodes import Nodes, Replies
from flora_train.federated.flower.records import FACTS, VALUES, array_record, unpacked
from flora_train.federated.loaded import LoadedRun
from flora_train.federated.population import Population
from flora_train.federated.remote import Answer, broadcast_to, collect_answers
from flora_train.federated.round_server import RoundAnswers, RoundServer
from flora_train.federated.rounds import RoundOptions, RoundRecord, ServerProgress
from flora_train.federated.stages import Stage
from flora_train.federated.state import GlobalState, values_for
from flora_train.federated.strategy_run import AdapterRounds, RoundEngine
from flora_train.federated.updates import ClientOutcome


class RemoteRounds:
    """The rounds of one stage.

    Args:
        server: With the state before them.
        nodes: The clients.
        bank: The server's own, to evaluate and export the global adapter.
        history: Of the base.
        facts: Sent with every round, beside its number.
        timeout: Seconds that the clients of a round have.
    """

    def __init__(
        self,
        server: RoundServer,
        nodes: Nodes,
        bank: AdapterBank,
        *,
        history: BaseHistory,
        facts: dict[str, str | list[str]],
        timeout: float,
    ) -> None:
        self.server, self.nodes, self.bank = server, nodes, bank
        self.history, self.facts, self.timeout = history, facts, timeout

    @property
    def state(self) -> GlobalState:
        """The server's state after the last round."""
        return self.server.state

    @property
    def progress(self) -> ServerProgress:
        """How far rounds have come."""
        return self.server.progress

    def round(self) -> RoundRecord:
        """Run one round. Raises UserError if more rounds failed than `failed_rounds`."""
        begun, number = time.monotonic(), self.progress.round
        chosen = self.server.choose()
        self.nodes.identify()
        online, contents, sent = self.nodes.online(), {}, {}
        for client in chosen:
            if client in online:
                content, sent[client] = self._content(client, online[client])
                contents[client] = (online[client], content)
        replies = self.nodes.ask(contents, round_number=number, timeout=self.timeout)
        for client in chosen:
            if client not in online:
                replies.silent[client] = "no node of it is connected"
        answers, failed = self._read(replies)
        accepted, outcomes = collect_answers(chosen, answers, self.server.specs, self.state, failed=failed)
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
        self.progress.unseen[client] = 0
        content = RecordDict({VALUES: array_record(arrays), FACTS: facts, **records})
        return content, more + sum(array.nbytes for array in arrays)

    def _read(self, replies: Replies) -> tuple[dict[str, Answer], dict[str, ClientOutcome]]:
        answers, failed = {}, {}
        for client, content in replies.contents.items():
            try:
                answers[client] = unpacked(content)
            except UserError as error:
                failed[client] = ClientOutcome(client, "excluded", str(error))
        for client, reason in replies.errors.items():
            failed[client] = ClientOutcome(client, "excluded", f"its program failed: {reason}")
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
        timeout: Seconds that the clients of a round have.
    """

    def __init__(
        self,
        loaded: LoadedRun,
        population: Population,
        options: RoundOptions,
        stages: list[Stage],
        *,
        nodes: Nodes,
        timeout: float,
    ) -> None:
        self.nodes, self.timeout = nodes, timeout
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
        facts: dict[str, str | list[str]] = {"stage": self.stage.name}
        if self.loaded.labels is not None:
            facts["labels"] = list(self.loaded.labels.labels)
        return RemoteRounds(server, self.nodes, bank, history=history, facts=facts, timeout=self.timeout)
