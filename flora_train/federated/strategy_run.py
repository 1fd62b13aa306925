"""One strategy with one seed: its rounds, what is saved of them, and how good the global adapter is."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from flora_train.adapters.pool import Pool
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.federated_schema import DEFAULT_CLIENTS, GLOBAL_TASK
from flora_train.config.json_format import JsonObject
from flora_train.config.schema import RunConfig
from flora_train.federated.bank_values import adapted_weight, adapted_weights, read_values
from flora_train.federated.base_training import load_base
from flora_train.federated.full_finetuning import FullFineTuning
from flora_train.federated.loaded import LoadedRun
from flora_train.federated.local_training import Client, LocalSteps
from flora_train.federated.population import Population
from flora_train.federated.rounds import RoundOptions, RoundRecord, ServerProgress
from flora_train.federated.saved_run import SavedRun
from flora_train.federated.scores import Scores, scores_of
from flora_train.federated.simulation import Simulation
from flora_train.federated.slora import second_stage
from flora_train.federated.stages import Stage, client_specs, local_steps_of
from flora_train.federated.state import GlobalState, initial_state
from flora_train.federated.values import AdapterValues
from flora_train.training.heldout import evaluate_heldout
from flora_train.training.trainer import Trainer

logger = logging.getLogger(__name__)

VALUES, BASE = "values.", "base."
"""Prefixes of saved tensors: those of the global adapter, and weights of the base that rounds changed."""


class RoundEngine(Protocol):
    """What runs the rounds of one stage: a simulation, or a server whose clients are elsewhere."""

    @property
    def state(self) -> GlobalState:
        """After the last round."""

    @property
    def progress(self) -> ServerProgress:
        """How far rounds have come."""

    def round(self) -> RoundRecord:
        """Run the next round."""

    def load_global(self, adapter: str) -> None:
        """Write the global values into an adapter of the bank."""


class StrategyRun(ABC):
    """The rounds of one strategy with one seed."""

    trainer: Trainer

    def __init__(self, loaded: LoadedRun, population: Population, options: RoundOptions) -> None:
        self.loaded, self.population, self.options = loaded, population, options
        self.after_step: Callable[[], None] = lambda: None
        """Called after every local step; it may raise an exception to stop."""

    @property
    @abstractmethod
    def stage(self) -> Stage:
        """That of the next round, or of the last one."""

    @abstractmethod
    def round(self) -> RoundRecord:
        """Run the next round. Raises UserError if too few updates can be used."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Values and weights after the last round."""

    @abstractmethod
    def facts(self) -> JsonObject:
        """What is saved beside them."""

    @abstractmethod
    def resume_from(self, saved: SavedRun) -> None:
        """Continue after the rounds that were saved."""

    def probe(self) -> None:
        """Find what cannot be run before anything is trained. Raises UserError."""
        self.options.choose([own.name for own in self.population.clients], 0)

    @abstractmethod
    def load_global(self, adapter: str) -> None:
        """Write the global adapter into one of the bank."""

    @property
    @abstractmethod
    def global_adapter(self) -> str:
        """Name of the adapter of the bank that holds the global one after `scores`."""

    @property
    def sent_values(self) -> int:
        """Numbers that a client sends after a round of the present stage."""
        values = read_values(self.trainer.bank, self.global_adapter)
        return sum(tensor.numel() for _, tensor in values.tensors())

    def scores(self) -> Scores:
        """How good the global adapter is on all held-out examples: one client's after the other's, where each
        has a task of its own."""
        trainer, bank = self.trainer, self.trainer.bank
        self.load_global(self.global_adapter)
        tasks = [self.population.tasks[GLOBAL_TASK]]
        if not self.population.shares_heldout:
            own_tasks = [self.population.tasks[client.name] for client in self.population.clients]
            tasks = [replace(task, name=GLOBAL_TASK) for task in own_tasks]
        results = []
        for task in tasks:
            heldout = evaluate_heldout(
                trainer.row_losses,
                bank,
                [task],
                max_tokens=2 * trainer.config.training.tokens_per_microbatch,
                pad_token=trainer.context.pad_token,
                with_test=True,
                collate=trainer.context.collate,
            )
            results.append((heldout[GLOBAL_TASK], bank.id_of(self.global_adapter)))
        return scores_of(results)

    def _clients(self, specs: Mapping[str, AdapterSpec]) -> list[Client]:
        data = self.population.clients
        return [Client(own.name, specs[own.name].name, own.examples) for own in data]


class AdapterRounds(StrategyRun):
    """Rounds in which clients train adapters: one stage, or the two of SLoRA.

    Args:
        loaded: Data and base.
        population: The clients.
        options: How rounds are run. Their algorithm is that of the stage.
        stages: What is trained.
    """

    def __init__(
        self, loaded: LoadedRun, population: Population, options: RoundOptions, stages: list[Stage]
    ) -> None:
        super().__init__(loaded, population, options)
        self.stages = stages
        self.left_out: float | None = None
        """Share of the first stage's update that the second did not begin with."""
        self._enter(0)
        self._begin(self._initial_state(), ServerProgress())

    @property
    def stage(self) -> Stage:
        return self.stages[self._index]

    @property
    def global_adapter(self) -> str:
        return self.stage.spec.name

    def round(self) -> RoundRecord:
        if self.engine.progress.round == self.stage.first_round + self.stage.rounds:
            self._enter_second_stage()
        return self.engine.round()

    def load_global(self, adapter: str) -> None:
        self.engine.load_global(adapter)

    def probe(self) -> None:
        """Make the bank of every stage, to find what cannot be run before anything is trained. Afterwards it
        is as before the first round. Raises UserError."""
        for index in reversed(range(len(self.stages))):
            self._enter(index)
            self._begin(self._initial_state(), ServerProgress())

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{VALUES}{name}": tensor for name, tensor in self.engine.state.values.tensors()}
        if self.stage.algorithm == "fedex":
            found |= {f"{BASE}{module}": weight for module, weight in self._adapted_weights().items()}
        return found

    def facts(self) -> JsonObject:
        state = self.engine.state
        return {
            "stage": self._index,
            "base": state.base,
            "mask": state.mask,
            "left_out": self.left_out,
            **asdict(self.engine.progress),
        }

    def resume_from(self, saved: SavedRun) -> None:
        facts: Mapping[str, Any] = saved.facts
        self.left_out = facts["left_out"]
        self._enter(facts["stage"])
        begin = self._initial_state()
        values = begin.values.map(lambda name, own: saved.tensors[f"{VALUES}{name}"].to(own))
        for module, weight in self._adapted_weights().items():
            if f"{BASE}{module}" in saved.tensors:
                weight.copy_(saved.tensors[f"{BASE}{module}"])
        state = GlobalState(begin.spec, values, facts["base"], facts["mask"])
        self._begin(state, ServerProgress(facts["round"], facts["failures"], dict(facts["unseen"])))

    def _enter(self, index: int) -> None:
        """Make the bank of a stage."""
        self._index = index
        federated = self.loaded.config.federated
        assert federated is not None
        names = [own.name for own in self.population.clients]
        ranks = None if self.stage.name == "central" else federated.client_ranks
        self._specs = client_specs(self.stage.spec, names, ranks)
        self.trainer = self.loaded.trainer(
            [*self._specs.values(), self.stage.spec],
            self.population,
            changes_base=self.stage.algorithm == "fedex",
        )

    def _pool(self) -> Pool:
        bank = self.trainer.bank
        return bank.location[bank.id_of(self.global_adapter)][0]

    def _initial_state(self) -> GlobalState:
        return initial_state(self._pool(), self.stage.spec, base=self.loaded.base, seed=self.options.seed)

    def _begin(self, state: GlobalState, progress: ServerProgress) -> None:
        self.engine = self._make_engine(state, progress)

    def _make_engine(self, state: GlobalState, progress: ServerProgress) -> RoundEngine:
        return Simulation(
            self.trainer,
            self._clients(self._specs),
            state,
            options=self._stage_options,
            progress=progress,
            after_step=lambda: self.after_step(),
        )

    @property
    def _stage_options(self) -> RoundOptions:
        return replace(self.options, algorithm=self.stage.algorithm)

    def _enter_second_stage(self) -> None:
        first, failures = self.engine.state, self.engine.progress.failures
        self._enter(self._index + 1)
        second = second_stage(
            first, self._pool(), self.stage.spec, seed=self.options.seed, weight_of=self._weight_of
        )
        self.left_out = second.relative_error
        logger.info(
            f"{self.stage.spec.family}: the second stage begins with the first one's update but for "
            f"{100 * second.relative_error:.0f} % of its norm: rank {self.stage.spec.rank} holds no more"
        )
        self._begin(second.state, ServerProgress(self.stage.first_round, failures))

    def _weight_of(self, module: str) -> Tensor:
        return adapted_weight(self.trainer.bank, module)

    def _adapted_weights(self) -> dict[str, Tensor]:
        return adapted_weights(self.trainer.bank, self._pool())


class FullRounds(StrategyRun):
    """Rounds in which clients train every weight of the base, one client after the other."""

    def __init__(
        self, loaded: LoadedRun, population: Population, options: RoundOptions, stage: Stage
    ) -> None:
        super().__init__(loaded, population, options)
        self._stage = stage
        self._specs = client_specs(stage.spec, [own.name for own in population.clients], None)
        self.trainer = loaded.trainer([*self._specs.values(), stage.spec], population, changes_base=True)
        self._begin(0)
        start = initial_state(self._pool(), stage.spec, base=loaded.base, seed=options.seed)
        self.rounds.head = start.values

    @property
    def stage(self) -> Stage:
        return self._stage

    @property
    def global_adapter(self) -> str:
        return self._stage.spec.name

    @property
    def sent_values(self) -> int:
        base = sum(weight.numel() for weight in self._changed().values())
        return base + super().sent_values

    def round(self) -> RoundRecord:
        return self.rounds.round()

    def load_global(self, adapter: str) -> None:
        self.rounds.load_global_head(adapter)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{VALUES}{name}": tensor for name, tensor in self.rounds.head.tensors()}
        return found | {f"{BASE}{name}": weight for name, weight in self._changed().items()}

    def facts(self) -> JsonObject:
        done = self.rounds.first_round + len(self.rounds.records)
        return {"round": done, "failures": self.rounds.failures}

    def resume_from(self, saved: SavedRun) -> None:
        weights = {}
        for name, tensor in saved.tensors.items():
            if name.startswith(BASE):
                weights[name.removeprefix(BASE)] = tensor
        load_base(self.trainer.model, weights)
        facts: Mapping[str, Any] = saved.facts
        head: AdapterValues = self.rounds.head
        self._begin(facts["round"], facts["failures"])
        self.rounds.changed = set(weights)
        self.rounds.head = head.map(lambda name, own: saved.tensors[f"{VALUES}{name}"].to(own))

    def _begin(self, first_round: int, failures: int = 0) -> None:
        self.rounds = FullFineTuning(
            self.trainer,
            self._clients(self._specs),
            self.options,
            first_round=first_round,
            failures=failures,
            after_step=lambda: self.after_step(),
        )

    def _pool(self) -> Pool:
        bank = self.trainer.bank
        return bank.location[bank.id_of(self.global_adapter)][0]

    def _changed(self) -> dict[str, Tensor]:
        named: dict[str, torch.nn.Parameter] = dict(self.trainer.model.named_parameters())
        return {name: named[name].detach() for name in sorted(self.rounds.changed)}


def make_strategy_run(
    loaded: LoadedRun, population: Population, stages: list[Stage], *, strategy: str, seed: int
) -> StrategyRun:
    """The rounds of a strategy, before its first round.

    Args:
        loaded: Data and base.
        population: The clients, with that seed.
        stages: Of `stages_of`.
        strategy: A key of federated.strategies.
        seed: One of federated.seeds.

    Returns:
        The rounds.

    Raises:
        UserError: The strategy cannot be run with these clients.
    """
    options = round_options(loaded.config, strategy, seed=seed)
    if stages[0].name == "central":
        population = population.centralised()
    if stages[0].algorithm == "full":
        return FullRounds(loaded, population, options, stages[0])
    return AdapterRounds(loaded, population, options, stages)


def round_options(config: RunConfig, strategy: str, *, seed: int) -> RoundOptions:
    """How the rounds of a strategy are run. Their algorithm is set by stage."""
    federated = config.federated
    assert federated is not None
    central = federated.strategies[strategy].central
    steps = local_steps_of(config, federated.strategies[strategy])
    local = LocalSteps(batch_examples=federated.batch_examples, steps=steps)
    if federated.local_epochs is not None:
        passes = float(federated.local_epochs)
        if central:
            clients = federated.num_clients or DEFAULT_CLIENTS
            passes *= federated.rounds * (federated.clients_per_round or clients) / clients
        local = LocalSteps(batch_examples=federated.batch_examples, epochs=max(1, round(passes)))
    if central:
        return RoundOptions(local=local, seed=seed)
    return RoundOptions(
        clients_per_round=federated.clients_per_round,
        local=local,
        seed=seed,
        clients_at_once=federated.clients_at_once,
        min_clients=federated.min_clients,
        failed_rounds=federated.failed_rounds,
    )
