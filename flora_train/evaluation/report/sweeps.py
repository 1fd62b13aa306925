"""Sweeps in the report: swept keys, points against each key, and whether a winner's lead is clear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.sweep import SWEPT
from flora_train.evaluation.report.types import Report, SweepMember, SweepResult, TaskResult
from flora_train.evaluation.result_model import Interval

Setting = float | str
Estimate = tuple[float, float, float]
"""Value, low and high."""

HEADINGS = {
    "lr": "learning rate",
    "lr_schedule": "learning-rate schedule",
    "max_grad_norm": "maximum gradient norm",
}
"""Swept key -> its name in headings, where it differs from the key without underscores."""


def swept_settings(adapters: Mapping[str, AdapterConfig]) -> dict[str, dict[str, Setting]]:
    """Family -> values of the keys in which the settings of its sweep differ. adapters: family -> its
    configuration."""
    sweeps: dict[str, list[str]] = {}
    for family, adapter in adapters.items():
        if adapter.sweep is not None:
            sweeps.setdefault(adapter.sweep, []).append(family)
    settings = {}
    for families in sweeps.values():
        keys = [key for key in SWEPT if len({str(getattr(adapters[family], key)) for family in families}) > 1]
        for family in families:
            settings[family] = {key: _setting(getattr(adapters[family], key)) for key in keys}
    return settings


def _setting(value: object) -> Setting:
    if isinstance(value, (int, float)):
        return float(value)
    return "none" if value is None else str(value)


@dataclass(frozen=True)
class SweepPoint:
    """One setting of a sweep in a plot against one of its keys."""

    family: str
    x: Setting
    loss: Estimate | None
    """Bits per byte, with the interval of the difference to the base. None: not finite."""


@dataclass(frozen=True)
class SweepSeries:
    """Settings of a sweep that differ in one key only."""

    label: str
    points: Sequence[SweepPoint]


@dataclass(frozen=True)
class SweepPlot:
    """All sweeps of one key on one task."""

    task: str
    base: float | None
    """Bits per byte of the base model."""
    series: list[SweepSeries] = field(default_factory=list)


def sweep_plots(report: Report) -> dict[str, list[SweepPlot]]:
    """Swept key -> a plot for each task that has a sweep of it. Preference tasks have none."""
    results = {result.task: result for result in report.results}
    plots: dict[str, dict[str, SweepPlot]] = {}
    for sweep in report.sweeps:
        if sweep.task not in results or sweep.objective != "sft":
            continue
        result = results[sweep.task]
        for key in _keys(sweep):
            tasks = plots.setdefault(key, {})
            plot = tasks.setdefault(sweep.task, SweepPlot(sweep.task, result.base.bits_per_byte.value))
            plot.series.extend(_series(sweep, key, result))
    return {key: list(tasks.values()) for key, tasks in plots.items()}


def heading(key: str) -> str:
    """The name of a swept key in headings."""
    return HEADINGS.get(key, key.replace("_", " "))


def winner_is_clear(sweep: SweepResult, report: Report) -> bool:
    """Whether the interval of the difference between the best two settings of a sweep excludes zero."""
    measured = []
    for member in sweep.members:
        loss = sweep.loss(member)
        if loss is not None:
            measured.append((loss, member.family))
    ranked = [family for _, family in sorted(measured)]
    if len(ranked) < 2:
        return bool(ranked)
    for first, second, difference in _loss_differences(sweep, report):
        if {first, second} == set(ranked[:2]):
            return difference.excludes_zero
    return False


def _loss_differences(sweep: SweepResult, report: Report) -> Iterator[tuple[str, str, Interval]]:
    """First and second family of each pair on the sweep's task, and the difference of their losses."""
    if sweep.objective == "sft":
        for result in report.results:
            if result.task == sweep.task:
                yield from ((row.first, row.second, row.bits_per_byte) for row in result.differences)
        return
    for figure in report.figures:
        if figure.task == sweep.task and figure.figure == "contrastive_loss":
            yield from ((row.first, row.second, row.value) for row in figure.differences)
    for preferences in report.preferences:
        if preferences.task == sweep.task:
            yield from ((row.first, row.second, row.loss) for row in preferences.differences)


def _keys(sweep: SweepResult) -> list[str]:
    return list(dict.fromkeys(key for member in sweep.members for key in member.settings))


def _series(sweep: SweepResult, key: str, result: TaskResult) -> list[SweepSeries]:
    """One series for every combination of the other swept keys."""
    grouped: dict[str, list[SweepPoint]] = {}
    for member in sweep.members:
        if key not in member.settings:
            continue
        others = [
            f"{heading(other)} {written(value)}" for other, value in member.settings.items() if other != key
        ]
        label = ", ".join([sweep.sweep, *others])
        point = SweepPoint(member.family, member.settings[key], _loss(member, result))
        grouped.setdefault(label, []).append(point)
    return [SweepSeries(label, points) for label, points in grouped.items()]


def _loss(member: SweepMember, result: TaskResult) -> Estimate | None:
    value, base = member.bits_per_byte, result.base.bits_per_byte.value
    if value is None:
        return None
    contender = result.by_family.get(member.family)
    if contender is None or contender.difference_to_base.finite is None or base is None:
        return value, value, value
    _, low, high = contender.difference_to_base.finite
    return value, base + low, base + high


def written(value: Setting) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else f"{value:g}"
