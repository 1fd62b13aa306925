"""Every metric of each seed, beside the mean and the standard deviation over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flora_train.evaluation.report.formatting import mean_number, mean_share, number, share
from flora_train.evaluation.report.tables import Score, scores_of
from flora_train.evaluation.report.types import Report


@dataclass(frozen=True)
class SeedRow:
    """One method on one task."""

    task: str
    family: str
    mean: str
    """`0.812 ± 0.004`."""
    values: Sequence[tuple[str, str]]
    """Seed, and its value."""


@dataclass(frozen=True)
class SeedTable:
    """One metric of all methods that have several seeds."""

    metric: str
    unit: str
    rows: list[SeedRow] = field(default_factory=list)


def seed_tables(report: Report) -> list[SeedTable]:
    """A table for each metric; empty where no adapter has several seeds."""
    families: dict[str, dict[str, str]] = {}
    for adapter in report.adapters:
        if adapter.seeds_of is not None:
            families.setdefault(adapter.seeds_of, {})[adapter.family] = str(adapter.seed)
    if not families:
        return []
    scores = scores_of({"": report})
    by_method = {(score.metric.name, score.task, score.method): score for score in scores}
    tables: dict[str, SeedTable] = {}
    for score in scores:
        if score.method not in families:
            continue
        metric = score.metric
        unit = "percent" if metric.in_percent else ""
        values = []
        for family, seed in families[score.method].items():
            of_seed = by_method.get((metric.name, score.task, family))
            if of_seed is not None:
                values.append((seed, _value(of_seed)))
        table = tables.setdefault(metric.name, SeedTable(metric.name, unit))
        table.rows.append(SeedRow(score.task, score.method, _mean(score), values))
    return list(tables.values())


def _mean(score: Score) -> str:
    return mean_share(score.value) if score.metric.in_percent else mean_number(score.value)


def _value(score: Score) -> str:
    return share(score.value.value) if score.metric.in_percent else number(score.value.value)
