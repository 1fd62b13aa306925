"""A federated run: every strategy with every seed, round by round, saved after each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flora_train.config.federated_schema import FederatedConfig
from flora_train.config.schema import RunConfig
from flora_train.federated.loaded import LoadedRun
from flora_train.federated.population import Population, make_population
from flora_train.federated.result_types import Incident, RoundResult
from flora_train.federated.rounds import RoundRecord
from flora_train.federated.saved_run import SavedRun, read_saved, state_path, write_saved
from flora_train.federated.scores import Scores, figures_of_clients, intervals_of, resampled
from flora_train.federated.stages import Stage, stages_of
from flora_train.federated.strategy_run import StrategyRun, make_strategy_run
from flora_train.runtime.progress import ProgressBar
from flora_train.runtime.signals import Interrupted, StopSignals

logger = logging.getLogger(__name__)

SCORES = "scores."
"""Prefix of the saved tensors of the last evaluation."""


@dataclass(frozen=True)
class PlannedRun:
    """One strategy with one seed, before it is run."""

    name: str
    """A key of `FederatedConfig.runs`."""
    strategy: str
    seed: int
    population: Population
    stages: list[Stage]

    @property
    def rounds(self) -> int:
        """Of all stages."""
        return self.stages[-1].first_round + self.stages[-1].rounds

    def open(self, loaded: LoadedRun) -> StrategyRun:
        """Its rounds, before the first."""
        return make_strategy_run(loaded, self.population, self.stages, strategy=self.strategy, seed=self.seed)


def plan_runs(loaded: LoadedRun) -> list[PlannedRun]:
    """All runs, in the order in which they are run. Raises UserError for clients that cannot be made."""
    federated = federated_of(loaded)
    populations: dict[int, Population] = {}
    for seed in federated.seeds:
        populations[seed] = make_population(loaded.config, loaded.tasks, seed)
    planned = []
    for name, (strategy, seed) in federated.runs.items():
        stages = stages_of(loaded.config, name, loaded.labels)
        planned.append(PlannedRun(name, strategy, seed, populations[seed], stages))
    return planned


def federated_of(loaded: LoadedRun) -> FederatedConfig:
    """The section `federated` of a run that has one."""
    assert loaded.config.federated is not None
    return loaded.config.federated


def probe_runs(loaded: LoadedRun, planned: list[PlannedRun]) -> None:
    """Find what cannot be run before anything is trained: one seed of every strategy. Raises UserError."""
    probed: set[str] = set()
    for own in planned:
        if own.strategy not in probed:
            probed.add(own.strategy)
            own.open(loaded).probe()


def train_runs(loaded: LoadedRun, planned: list[PlannedRun]) -> None:
    """Run all rounds that are not saved yet.

    Args:
        loaded: Data and base.
        planned: Of `plan_runs`.

    Raises:
        UserError: More rounds than `failed_rounds` had too few usable updates; what was saved remains.
        Interrupted: SIGTERM or SIGINT; the rounds until then are saved.
    """
    done = 0
    with StopSignals() as signals:
        for own in planned:
            saved = read_saved(state_path(loaded.folder.path, own.name))
            if saved is None or len(saved.rounds) < own.rounds:
                _train_run(loaded, own, saved, signals, done)
            done += own.rounds


def _train_run(
    loaded: LoadedRun, planned: PlannedRun, saved: SavedRun | None, signals: StopSignals, done: int
) -> None:
    """Run the rounds of one strategy. done: rounds of the strategies before."""
    strategy = planned.open(loaded)
    rounds: list[RoundResult] = []
    if saved is not None:
        rounds = list(saved.rounds)
        strategy.resume_from(saved)

    def stop_if_told() -> None:
        if signals.stop_requested:
            raise Interrupted(done + len(rounds), "round")

    strategy.after_step = stop_if_told
    path = state_path(loaded.folder.path, planned.name)
    with ProgressBar(planned.name, planned.rounds, len(rounds)) as progress:
        while len(rounds) < planned.rounds:
            result, scores = run_round(loaded, planned, strategy)
            rounds.append(result)
            write_saved(path, saved_of(strategy, rounds, scores))
            progress.update(len(rounds), progress_of(result), force_line=True)
            stop_if_told()


def run_round(
    loaded: LoadedRun, planned: PlannedRun, strategy: StrategyRun
) -> tuple[RoundResult, Scores | None]:
    """One round, and the scores of the global adapter where it is due to be evaluated."""
    record = strategy.round()
    scores = None
    if is_evaluated(loaded.config, record.round + 1, planned.rounds):
        scores = strategy.scores()
    return result_of(loaded, strategy, record, scores), scores


def is_evaluated(config: RunConfig, number: int, rounds: int) -> bool:
    """Whether the global adapter is due to be evaluated after so many of the rounds."""
    assert config.federated is not None
    return number % config.federated.interval == 0 or number == rounds


def result_of(
    loaded: LoadedRun, strategy: StrategyRun, record: RoundRecord, scores: Scores | None
) -> RoundResult:
    """A round as reports have it."""
    incidents = []
    for outcome in record.outcomes:
        if outcome.status != "accepted":
            incidents.append(Incident(client=outcome.client, status=outcome.status, reason=outcome.reason))
    figures, clients = {}, {}
    if scores is not None:
        examples = len(scores.numerators)
        figures = intervals_of(resampled(scores, loaded.resampling), examples, loaded.resampling)
        positions = strategy.population.heldout_positions
        clients = figures_of_clients(scores, positions, loaded.resampling)
    return RoundResult(
        round=record.round,
        stage=strategy.stage.name,
        loss=record.loss,
        accepted=sum(outcome.status == "accepted" for outcome in record.outcomes),
        incidents=incidents,
        bytes_up=record.bytes_up,
        bytes_down=record.bytes_down,
        seconds_clients=record.seconds_clients,
        seconds_server=record.seconds_server,
        left_out=record.left_out,
        failure=record.failure,
        figures=figures,
        clients=clients,
    )


def saved_of(strategy: StrategyRun, rounds: list[RoundResult], scores: Scores | None) -> SavedRun:
    """What is saved after a round."""
    tensors = strategy.tensors()
    if scores is not None:
        tensors |= {f"{SCORES}{name}": tensor for name, tensor in scores.tensors().items()}
    return SavedRun(rounds, tensors, {**strategy.facts(), "values": strategy.sent_values})


def saved_scores(saved: SavedRun) -> Scores | None:
    """The scores after the last round; None where nothing is evaluated."""
    found = {}
    for name, tensor in saved.tensors.items():
        if name.startswith(SCORES):
            found[name.removeprefix(SCORES)] = tensor
    return Scores.from_tensors(found) if found else None


def progress_of(result: RoundResult) -> Mapping[str, str]:
    """The line of a round."""
    facts = {"clients": f"{result.accepted}/{result.accepted + len(result.incidents)}"}
    if result.loss is not None:
        facts["loss"] = f"{result.loss:.3f}"
    for name, figure in result.figures.items():
        if figure.value is not None:
            facts[name] = f"{figure.value:.3f}"
    return facts


def files_of(federated: FederatedConfig) -> list[str]:
    """The files that a federated run writes, beside those of every run."""
    states = [state_path(Path(), run).as_posix() for run in federated.runs]
    return [*states, "eval/federated.json", "eval/federated.html"]
