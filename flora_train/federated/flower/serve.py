"""The server's part of a deployment: rounds that are saved, and the results of a local run."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from flwr.serverapp import Grid

from flora_train.config.errors import user_error
from flora_train.config.schema import RunConfig
from flora_train.federated.build_report import build_report, write_federated_report
from flora_train.federated.flower.no_data import load_without_data, population_without_data
from flora_train.federated.flower.nodes import Nodes
from flora_train.federated.flower.remote_rounds import FlowerRounds, Limits
from flora_train.federated.flower.settings import Settings
from flora_train.federated.loaded import LoadedRun, load_federated
from flora_train.federated.population import make_population, names_of_clients
from flora_train.federated.report_page import write_page
from flora_train.federated.report_terminal import print_federated
from flora_train.federated.result_types import RoundResult
from flora_train.federated.run import PlannedRun, is_evaluated, progress_of, result_of, saved_of
from flora_train.federated.run_results import claim_folder, export_global, is_exported
from flora_train.federated.saved_run import SavedRun, read_saved, state_path, write_saved
from flora_train.federated.stages import stages_of
from flora_train.federated.strategy_run import round_options
from flora_train.run_context import as_it_began, check_base, check_data, resolve_config
from flora_train.runtime.environment import default_device
from flora_train.runtime.run_folder import RunFolder, RunStatus
from flora_train.training.origin import OriginOptions

logger = logging.getLogger(__name__)


def serve(grid: Grid, settings: Settings) -> None:
    """Run all rounds that are not saved yet, then report and export.

    Args:
        grid: Of Flower.
        settings: The deployment.

    Raises:
        UserError: Bad input, before any round; too few clients in time, or too few usable updates, with all
            earlier rounds saved.
    """
    folder = RunFolder(Path(settings.config.folder))
    config = resolve_config(settings.config, folder)
    status = folder.enter(config)
    try:
        if status == "finished":
            logger.info(f"{folder.path} holds this run, finished; it is kept")
            return
        _serve(grid, settings, config, folder, status)
    finally:
        folder.unlock()


def _serve(grid: Grid, settings: Settings, config: RunConfig, folder: RunFolder, status: RunStatus) -> None:
    started = time.monotonic()
    if status == "extended":
        raise user_error("tasks", None, "a finished federated run takes no more tasks: start another run")
    if status != "new":
        check_base(folder, config, OriginOptions())
        config = as_it_began(config, folder)
    loaded = _load(settings, config, folder)
    if status != "new" and settings.server_data:
        check_data(folder, loaded.tasks, OriginOptions())
    planned = plan(settings, loaded)
    nodes = Nodes(grid, names_of_clients(config))
    options = round_options(config, settings.strategy, seed=settings.seed)
    strategy = FlowerRounds(
        loaded,
        planned.population,
        options,
        planned.stages,
        nodes=nodes,
        limits=Limits(answers=settings.round_timeout, connected=settings.start_timeout),
        server_data=settings.server_data,
    )
    strategy.probe()
    saved = read_saved(state_path(folder.path, planned.name))
    done = 0 if saved is None else len(saved.rounds)
    if done < planned.rounds:
        chosen = options.choose(names_of_clients(config), done)
        nodes.wait_for_first(chosen, settings.start_timeout)
    claim_folder(loaded, with_data=settings.server_data)
    _train(loaded, planned, strategy, saved, with_scores=settings.server_data)
    if is_exported(planned.stages[-1]):
        export_global(loaded, strategy)
    report = build_report(loaded, [planned])
    write_federated_report(report, folder.evaluation)
    page = write_page(report, folder.evaluation)
    print_federated(report)
    logger.info(f"report: {page}")
    folder.update_run_json(finished=True, seconds=time.monotonic() - started)


def plan(settings: Settings, loaded: LoadedRun) -> PlannedRun:
    """The only strategy with its seed."""
    if settings.server_data:
        population = make_population(loaded.config, loaded.tasks, settings.seed)
    else:
        population = population_without_data(loaded)
    stages = stages_of(loaded.config, settings.strategy, loaded.labels)
    return PlannedRun(settings.strategy, settings.strategy, settings.seed, population, stages)


def _load(settings: Settings, config: RunConfig, folder: RunFolder) -> LoadedRun:
    if settings.server_data:
        return load_federated(config, folder, default_device())
    return load_without_data(config, folder, default_device())


def _train(
    loaded: LoadedRun,
    planned: PlannedRun,
    strategy: FlowerRounds,
    saved: SavedRun | None,
    *,
    with_scores: bool,
) -> None:
    path = state_path(loaded.folder.path, planned.name)
    rounds: list[RoundResult] = []
    if saved is not None:
        rounds = list(saved.rounds)
        strategy.resume_from(saved)
        logger.info(f"{len(rounds)} of {planned.rounds} rounds are saved")
    while len(rounds) < planned.rounds:
        record = strategy.round()
        scores = None
        if with_scores and is_evaluated(loaded.config, record.round + 1, planned.rounds):
            scores = strategy.scores()
        rounds.append(result_of(loaded, strategy, record, scores))
        write_saved(path, saved_of(strategy, rounds, scores))
        facts = ", ".join(f"{name} {value}" for name, value in progress_of(rounds[-1]).items())
        sent = f"{record.bytes_up:,} bytes up, {record.bytes_down:,} down, {record.seconds_clients:.1f} s"
        logger.info(f"round {len(rounds)} of {planned.rounds}: {facts}, {sent}")
