"""The report of a federated run, from what its rounds saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from flora_train.config.errors import user_error
from flora_train.evaluation.figures.intervals import Resampled
from flora_train.evaluation.result_model import read_results
from flora_train.evaluation.seeds import over_seeds
from flora_train.federated.loaded import LoadedRun
from flora_train.federated.result_types import (
    FederatedReport,
    SeedResult,
    StrategyDifference,
    StrategyResult,
)
from flora_train.federated.run import PlannedRun, federated_of, saved_scores
from flora_train.federated.saved_run import SavedRun, read_saved, state_path
from flora_train.federated.scores import OF_TEXT, intervals_of, mean_over_seeds, resampled
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.environment import dtype_of, environment, now
from flora_train.runtime.run_folder import RunFolder

REPORT = "federated.json"
"""In the folder eval/ of a run."""


def build_report(loaded: LoadedRun, planned: Sequence[PlannedRun]) -> FederatedReport:
    """The report of a run whose rounds are all saved.

    Args:
        loaded: Data and base.
        planned: All of its runs.

    Returns:
        The report: figures over seeds, and paired differences of all strategies.
    """
    federated, facts = federated_of(loaded), environment()
    saved = {own.name: _saved(loaded, own) for own in planned}
    examples = _examples(saved[planned[0].name])
    means: dict[str, Mapping[str, Resampled]] = {}
    strategies = []
    for name in federated.strategies:
        runs = [own for own in planned if own.strategy == name]
        figures = [_figures(loaded, saved[own.name]) for own in runs]
        means[name] = mean_over_seeds(figures)
        strategies.append(_strategy(loaded, name, runs, saved, figures=figures, mean=means[name]))
    names = list(means[planned[0].strategy])
    clients = len(planned[0].population.clients)
    return FederatedReport(
        name=loaded.config.name,
        model=loaded.config.model.path,
        dtype=dtype_of(loaded.model),
        machine=f"{facts.machine.processor}, {facts.machine.threads} threads",
        packages={name: version for name, version in facts.packages.items() if version is not None},
        created=now(),
        split=federated.split,
        alpha=federated.dirichlet_alpha,
        num_clients=clients,
        clients_per_round=federated.clients_per_round or clients,
        rounds=federated.rounds,
        local=_local_text(loaded),
        heldout_examples=examples,
        confidence=loaded.resampling.confidence,
        figures=names,
        lower_is_better=names[:1] == list(OF_TEXT),
        strategies=strategies,
        notes=_notes(planned, saved),
        differences=_differences(loaded, means, names[:1], examples),
    )


def _saved(loaded: LoadedRun, planned: PlannedRun) -> SavedRun:
    path = state_path(loaded.folder.path, planned.name)
    saved = read_saved(path)
    if saved is None or len(saved.rounds) < planned.rounds:
        raise user_error(str(path), None, "has not all rounds of the run: continue it with resume=true")
    return saved


def _examples(saved: SavedRun) -> int:
    """Held-out examples that were evaluated."""
    scores = saved_scores(saved)
    return 0 if scores is None else len(scores.numerators)


def _figures(loaded: LoadedRun, saved: SavedRun) -> dict[str, Resampled]:
    scores = saved_scores(saved)
    return {} if scores is None else resampled(scores, loaded.resampling)


def _strategy(
    loaded: LoadedRun,
    name: str,
    runs: Sequence[PlannedRun],
    saved: Mapping[str, SavedRun],
    *,
    figures: Sequence[Mapping[str, Resampled]],
    mean: Mapping[str, Resampled],
) -> StrategyResult:
    strategy, spec = federated_of(loaded).strategies[name], runs[0].stages[-1].spec
    examples = _examples(saved[runs[0].name])
    intervals = {}
    for figure, interval in intervals_of(mean, examples, loaded.resampling).items():
        intervals[figure] = over_seeds(interval, [own[figure].value for own in figures])
    seeds = []
    for own in runs:
        clients = {client.name: len(client.examples) for client in own.population.clients}
        seeds.append(
            SeedResult(
                name=own.name,
                seed=own.seed,
                rounds=saved[own.name].rounds,
                examples=clients,
                label_entropy=own.population.label_entropy,
            )
        )
    return StrategyResult(
        name=name,
        algorithm=strategy.algorithm,
        central=strategy.central,
        method="full" if strategy.algorithm == "full" else spec.method,
        rank=spec.rank or None,
        values=int(str(saved[runs[0].name].facts["values"])),
        seeds=seeds,
        figures=intervals,
    )


def _notes(planned: Sequence[PlannedRun], saved: Mapping[str, SavedRun]) -> list[str]:
    """What the second stage of SLoRA does not hold of the first one's update."""
    notes = []
    for own in planned:
        left_out = saved[own.name].facts.get("left_out")
        if isinstance(left_out, float):
            rank = own.stages[-1].spec.rank
            notes.append(
                f"{own.strategy}, seed {own.seed}: the second stage began with the first one's update "
                f"but for {100 * left_out:.0f} % of its norm, which rank {rank} does not hold."
            )
    return notes


def _differences(
    loaded: LoadedRun, means: Mapping[str, Mapping[str, Resampled]], figures: list[str], examples: int
) -> list[StrategyDifference]:
    """figures: the first one, if there is one."""
    differences = []
    for figure in figures:
        for first, second in combinations(means, 2):
            between = {figure: means[first][figure] - means[second][figure]}
            value = intervals_of(between, examples, loaded.resampling)[figure]
            differences.append(StrategyDifference(first=first, second=second, value=value))
    return differences


def _local_text(loaded: LoadedRun) -> str:
    federated = federated_of(loaded)
    batch = f"{federated.batch_examples} examples"
    if federated.local_epochs is not None:
        passes = "1 pass" if federated.local_epochs == 1 else f"{federated.local_epochs} passes"
        return f"{passes} over its examples in steps of {batch}"
    steps = loaded.config.training.steps
    return f"{steps} steps of {batch}"


def write_federated_report(report: FederatedReport, folder: Path) -> None:
    """Write federated.json into a folder. Raises UserError if the disk is full."""
    text = json.dumps(report.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    write_atomically(folder / REPORT, lambda path: path.write_text(text, encoding="utf-8"))


def read_federated_report(folder: RunFolder) -> FederatedReport:
    """The report of a federated run. Raises UserError if it is missing or damaged."""
    path = folder.evaluation / REPORT
    if not path.exists():
        hint = "has no report: the run did not finish. Continue it with resume=true"
        raise user_error("run", str(folder.path), hint)
    return read_results(path, FederatedReport, "resume=true overwrite=false writes it again")
