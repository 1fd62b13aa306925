"""The finished runs of a study: one of recipe=federated_local for each alpha, with the same strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flora_train.evaluation.result_model import Interval
from flora_train.federated.build_report import REPORT, read_federated_report
from flora_train.federated.result_types import FederatedReport, StrategyResult
from flora_train.runtime.run_folder import RunFolder


class StudyError(Exception):
    """A failure the user can act on; its text is the one line that is printed."""


@dataclass(frozen=True)
class Difference:
    """The first figure of one strategy minus that of another, means over seeds."""

    interval: Interval
    """Resamples held-out texts, the same for both."""
    of_seeds: tuple[float, ...]

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero and every seed has the sign of the mean."""
        signs = {value > 0 for value in self.of_seeds}
        return self.interval.excludes_zero and len(signs) == 1

    @property
    def value(self) -> float:
        return self.interval.value or 0.0


class StudyRun:
    """One finished run."""

    def __init__(self, report: FederatedReport, folder: Path) -> None:
        self.report, self.folder = report, folder
        self.strategies = {own.name: own for own in report.strategies}
        self._differences = {(own.first, own.second): own.value for own in report.differences}

    @property
    def alpha(self) -> float:
        """Of the Dirichlet distribution."""
        assert self.report.alpha is not None
        return self.report.alpha

    @property
    def figure(self) -> str:
        """The figure that is compared."""
        return self.report.figures[0]

    def value(self, strategy: StrategyResult) -> Interval:
        """The figure after the last round: mean over seeds, interval over texts, deviation over seeds."""
        return strategy.figures[self.figure]

    def difference(self, first: str, second: str) -> Difference:
        """The figure of `first` minus that of `second`, paired by text and by seed. Raises StudyError if one
        is no strategy of the run."""
        for name in (first, second):
            if name not in self.strategies:
                known = ", ".join(self.strategies)
                raise StudyError(f"{self.folder}: has no strategy {name}; it has {known}")
        if (first, second) in self._differences:
            interval = self._differences[first, second]
        else:
            interval = self._differences[second, first].negated()
        ours, theirs = self._of_seeds(first), self._of_seeds(second)
        return Difference(interval, tuple(a - b for a, b in zip(ours, theirs, strict=True)))

    def by_round(self, strategy: StrategyResult) -> dict[int, float]:
        """Number of rounds -> the mean of the figure over seeds, where it was evaluated with every seed."""
        found: dict[int, list[float]] = {}
        for seed in strategy.seeds:
            for own in seed.rounds:
                value = None
                if self.figure in own.figures:
                    value = own.figures[self.figure].value
                if value is not None:
                    found.setdefault(own.round + 1, []).append(value)
        complete = {n: values for n, values in found.items() if len(values) == len(strategy.seeds)}
        return {number: float(np.mean(values)) for number, values in sorted(complete.items())}

    def _of_seeds(self, name: str) -> list[float]:
        values = []
        for seed in self.strategies[name].seeds:
            values.append(seed.last.figures[self.figure].value or 0.0)
        return values


def read_runs(folders: Sequence[Path]) -> list[StudyRun]:
    """The runs of a study, by rising alpha.

    Args:
        folders: Of the runs.

    Returns:
        The runs.

    Raises:
        StudyError: There is none, or two cannot be compared.
        UserError: A run has no report, or a damaged one.
    """
    if not folders:
        raise StudyError("no run: make federated-study runs them into outputs/federated_<clients>_<alpha>")
    runs = [StudyRun(read_federated_report(RunFolder(folder)), folder) for folder in folders]
    for run in runs:
        if run.report.alpha is None:
            raise StudyError(f"{run.folder}: is divided by {run.report.split}, without alpha")
    runs.sort(key=lambda run: (run.alpha, run.report.num_clients))
    first = runs[0]
    for run in runs[1:]:
        for what in ("model", "rounds", "local", "heldout_examples", "figures"):
            own, expected = getattr(run.report, what), getattr(first.report, what)
            if own != expected:
                raise StudyError(f"{run.folder}: {what} is {own}, that of {first.folder} {expected}")
    return runs


def finished_runs(outputs: Path) -> list[Path]:
    """Folders `federated_<clients>_<alpha>` in `outputs` that have a report."""
    found = []
    for folder in sorted(outputs.glob("federated_*_*")):
        if _is_number(folder.name.split("_")[-1]) and (folder / "eval" / REPORT).exists():
            found.append(folder)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
