"""Heatmaps of tasks by methods: darker where a method gains more over the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flora_train.evaluation.report.formatting import NOT_FINITE, number, share, shared_digits, verdict
from flora_train.evaluation.report.types import Report
from flora_train.evaluation.result_model import Interval

MANY_METHODS = 8
"""With more methods than this and than tasks, the methods are rows."""
SCALE_QUANTILE = 0.95
"""This quantile of all differences has the full colour, so that a single outlier does not pale the others."""


@dataclass(frozen=True)
class Cell:
    """One task and method."""

    text: str
    """The difference to the base."""
    strength: float
    """Size of the difference, 0 to 1 of the map's scale."""
    verdict: Literal["better", "worse", "unclear"]


@dataclass(frozen=True)
class Heatmap:
    """The differences of one metric."""

    title: str
    tasks: int
    corner: str
    """What the rows are: task or method."""
    columns: Sequence[str]
    """Methods; tasks where the rows are methods."""
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
    """A task, and a cell for each column; None where the task has no such adapter."""


def heatmaps(report: Report) -> list[Heatmap]:
    """Maps of loss, every suite, reward accuracy and error rates, where there are two tasks or more."""
    losses = {}
    for result in report.results:
        if result.objective == "sft":
            of_task = {family: row.difference_to_base for family, row in result.by_family.items()}
            losses[result.task] = of_task
    digits = max(2, shared_digits(report.results) - 1)
    maps = [_heatmap("held-out loss, bits per byte", losses, lambda value: number(value, digits, "+"))]
    for suite in report.code:
        k = suite.pass_at_k[0]
        passed = {}
        for scores in suite.languages:
            passed[scores.name] = {family: d[k].negated() for family, d in scores.to_base.items()}
        title = f"pass@{k} on {suite.suite} problems, percentage points"
        maps.append(_heatmap(title, passed, lambda value: share(-value, "+")))
    if report.preferences:
        accuracies = {}
        for part in report.preferences:
            of_task = {family: d.reward_accuracy.negated() for family, d in part.to_base.items()}
            accuracies[part.task] = of_task
        title = "reward accuracy on held-out preferences, percentage points"
        maps.append(_heatmap(title, accuracies, lambda value: share(-value, "+")))
    if report.speech is not None:
        rates = {}
        for spoken in report.speech.languages:
            of_task = {family: d.rate(spoken.metric) for family, d in spoken.to_base.items()}
            rates[spoken.task] = of_task
        maps.append(_heatmap("error rate", rates, lambda value: number(value, 2, "+")))
    return [heatmap for heatmap in maps if heatmap.tasks > 1]


def _heatmap(
    title: str, differences: Mapping[str, Mapping[str, Interval]], write: Callable[[float], str]
) -> Heatmap:
    """differences: task -> family -> difference to the base, below zero where better."""
    families: dict[str, None] = {}
    sizes = []
    for row in differences.values():
        families |= dict.fromkeys(row)
        sizes += [abs(d.finite[0]) for d in row.values() if d.finite is not None]
    sizes.sort()
    scale = sizes[int(SCALE_QUANTILE * (len(sizes) - 1))] if sizes else 0.0
    rows = []
    for task, row in differences.items():
        cells = [_cell(row.get(family), scale, write) for family in families]
        rows.append((task, cells))
    if len(families) > MANY_METHODS and len(families) > len(rows):
        tasks = [task for task, _ in rows]
        columns = zip(*(cells for _, cells in rows), strict=True)
        return Heatmap(title, len(rows), "method", tasks, list(zip(families, columns, strict=True)))
    return Heatmap(title, len(rows), "task", list(families), rows)


def _cell(difference: Interval | None, scale: float, write: Callable[[float], str]) -> Cell | None:
    if difference is None:
        return None
    conclusion = verdict(difference)
    if difference.finite is None or conclusion == "not finite":
        return Cell(NOT_FINITE, 0.0, "unclear")
    value, _, _ = difference.finite
    strength = min(abs(value), scale) / (scale or 1.0)
    return Cell(write(value), strength, conclusion)
