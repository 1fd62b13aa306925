"""Comparison of several runs: metrics side by side, settings that differ, and cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from flora_train.config.paths import read_mapping
from flora_train.evaluation.figures.texts import text_of
from flora_train.evaluation.report.figure_tables import rows_of
from flora_train.evaluation.report.formatting import (
    ABSENT,
    bracketed,
    count,
    listed,
    mean_number,
    mean_share,
    number,
    plural,
    share,
    stage_duration,
)
from flora_train.evaluation.report.loss_names import tasks_of_labels
from flora_train.evaluation.report.preference_figures import figures_of, setting_of, values_of
from flora_train.evaluation.report.types import Report
from flora_train.evaluation.result_model import Interval
from flora_train.runtime.config_changes import flat

IGNORED_KEYS = ("name", "output_dir", "overwrite", "resume")
"""Configuration keys that may differ between runs of the same settings."""
SEED = "seed"


@dataclass(frozen=True)
class Cell:
    """A metric of one run, as text."""

    value: str
    change: str
    """The difference to the base with its interval. Of the base: its own interval."""
    best: bool = False
    """Whether the interval does not overlap those of the other runs, and is on the better side of them."""


@dataclass(frozen=True)
class Row:
    """A metric of one task and method."""

    what: tuple[str, str]
    """Task and method."""
    cells: Sequence[Cell | None]
    """One for each run; None where a run lacks the metric."""
    note: str
    """Why the runs cannot be compared here, or ""."""
    seeds: Sequence[str] = ()
    """Mean and range of each group of runs that differ in the seed only: `0.812 (0.805 to 0.820)`, or ""."""


@dataclass(frozen=True)
class Measure:
    """A metric of all tasks and methods."""

    title: str
    rows: Sequence[Row]
    higher_is_better: bool = False


@dataclass(frozen=True)
class RunMetric:
    """A metric of one run, task and method."""

    title: str
    task: str
    family: str
    estimate: Interval
    change: Interval | None
    """The difference to the base on the same examples; None for the base."""
    examples: tuple[object, ...]
    """Identifies the examples and how they were evaluated: metrics are comparable where it is equal."""
    setting: str = ""
    """What else the metric depends on, such as beta."""
    in_percent: bool = False
    higher_is_better: bool = False

    @property
    def compared(self) -> Interval:
        """The interval that runs are compared by."""
        return self.change or self.estimate


def measures(reports: Sequence[Report]) -> list[Measure]:
    """Held-out loss, pass@k, error rates, rewards and figures of every task and method."""
    groups = seed_groups(reports)
    metrics: dict[str, dict[tuple[str, str], dict[int, RunMetric]]] = {}
    for i, report in enumerate(reports):
        for metric in _metrics(report):
            by_method = metrics.setdefault(metric.title, {})
            by_method.setdefault((metric.task, metric.family), {})[i] = metric
    compared = []
    for title, by_method in metrics.items():
        rows = [_row(what, by_run, groups) for what, by_run in by_method.items()]
        first = next(iter(next(iter(by_method.values())).values()))
        compared.append(Measure(title, rows, first.higher_is_better))
    return compared


def seed_groups(reports: Sequence[Report]) -> list[list[int]]:
    """Indices of runs in groups: runs whose configurations differ in the seed only are one group."""
    alike: dict[str, list[int]] = {}
    seeds = []
    for i, report in enumerate(reports):
        config = _configuration(report)
        seeds.append(config.get(SEED, 0))
        settings = [(key, repr(value)) for key, value in config.items() if key not in (SEED, *IGNORED_KEYS)]
        alike.setdefault(repr(sorted(settings)), []).append(i)
    groups = []
    for members in alike.values():
        distinct = {seeds[i] for i in members}
        if len(distinct) == len(members):
            groups.append(members)
        else:
            groups += [[i] for i in members]
    return sorted(groups)


def with_seeds(names: Sequence[str], reports: Sequence[Report]) -> list[str]:
    """The labels of runs, with the seed of each run that differs from another in the seed only."""
    labelled = list(names)
    for group in seed_groups(reports):
        if len(group) > 1:
            for i in group:
                labelled[i] += f" (seed {_configuration(reports[i]).get(SEED, 0)})"
    return labelled


def verdicts(
    names: Sequence[str], compared: Sequence[Measure], groups: Sequence[Sequence[int]] | None = None
) -> str:
    """A sentence for each metric: how many adapters of each run are significantly better.

    groups: of `seed_groups`; the seeds of one configuration win together or not at all.
    """
    if groups is None:
        groups = [[i] for i in range(len(names))]
    joined = [" and ".join(names[i] for i in group) for group in groups]
    if len(groups) == 1:
        return (
            f"{joined[0]} differ only in the seed: none is better, and "
            "their range is the variation between seeds."
        )
    sentences = [sentence for measure in compared if (sentence := _verdict(measure, joined, groups))]
    return " ".join(sentences) or "The runs have no task and method in common."


def _verdict(measure: Measure, names: Sequence[str], groups: Sequence[Sequence[int]]) -> str:
    """The sentence for one metric; "" where no two runs have it. names: of groups."""
    rows = []
    for row in measure.rows:
        present = [cell for cell in row.cells if cell is not None]
        if len(present) > 1 and row.what[1] != "base":
            rows.append(row)
    if not rows:
        return ""
    title = measure.title.partition(",")[0]
    comparable = [row for row in rows if not row.note]
    if not comparable:
        return f"{title}: the runs cannot be compared, as their examples differ."
    adapters = plural(len(comparable), "comparable adapter")
    clear: list[str] = []
    for name, group in zip(names, groups, strict=True):
        won = sum(_wins(row, group) for row in comparable)
        verb = "is" if len(group) == 1 else "are"
        if won and not clear:
            clear.append(f"{name} {verb} significantly better on {won}")
        elif won:
            clear.append(f"{name} on {won}")
    if not clear:
        return f"{title}: no run is significantly better on any of {adapters}."
    return f"{title}: {listed(clear)} of {adapters}."


def _wins(row: Row, group: Sequence[int]) -> bool:
    cells = [row.cells[i] for i in group]
    return any(cell is not None and cell.best for cell in cells)


def settings(reports: Sequence[Report]) -> list[tuple[str, list[str]]]:
    """Configuration keys that differ, with every run's value."""
    configs = [_configuration(report) for report in reports]
    keys: dict[str, None] = {}
    for config in configs:
        keys |= dict.fromkeys(config)
    rows = []
    for key in keys:
        values = [str(config.get(key, ABSENT)) for config in configs]
        if key not in IGNORED_KEYS and len(set(values)) > 1:
            rows.append((key, values))
    return rows


def costs(reports: Sequence[Report]) -> list[tuple[str, list[str]]]:
    """Time, memory and machine of every run."""
    facts = [report.facts for report in reports]
    stages: dict[str, None] = {}
    for run in facts:
        stages |= dict.fromkeys(run.seconds)
    tokens = [sum(adapter.tokens for adapter in report.adapters) for report in reports]
    versions = [run.commit or run.flora_train or ABSENT for run in facts]
    return [
        ("adapters", [count(len(report.adapters)) for report in reports]),
        ("adapter tokens", [count(total) for total in tokens]),
        *((stage, [stage_duration(run.seconds.get(stage)) for run in facts]) for stage in stages),
        ("peak memory", [_gibibytes(run.peak_memory_bytes) for run in facts]),
        ("processes", [count(run.processes) for run in facts]),
        ("device", [run.device or ABSENT for run in facts]),
        ("processor", [run.machine.processor or ABSENT for run in facts]),
        ("flora_train", [version[:10] for version in versions]),
    ]


def labels(paths: Sequence[str]) -> list[str]:
    """Labels of runs: the shortest ends of their paths that differ."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-depth:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{path} ({i})" for i, path in enumerate(paths, start=1)]


def _configuration(report: Report) -> dict[str, Any]:
    """Dotted key -> value of the run's configuration. Raises UserError if it cannot be read."""
    return flat(read_mapping(report.facts.config, "the configuration in report.json"))


def _metrics(report: Report) -> Iterator[RunMetric]:
    yield from _heldout_metrics(report)
    yield from _code_metrics(report)
    yield from _speech_metrics(report)
    yield from _preference_metrics(report)
    yield from _figure_metrics(report)


def _heldout_metrics(report: Report) -> Iterator[RunMetric]:
    title = "Held-out loss, bits per byte"
    hashes = _heldout_hashes(report)
    for result in report.results:
        examples = (hashes[result.task], result.examples)
        base = result.base
        yield RunMetric(title, result.task, base.family, base.bits_per_byte, None, examples)
        for row in result.contenders:
            yield RunMetric(
                title, result.task, row.family, row.bits_per_byte, row.difference_to_base, examples
            )


def _code_metrics(report: Report) -> Iterator[RunMetric]:
    for suite in report.code:
        sampling = (suite.temperature, suite.top_p, suite.max_new_tokens)
        for k in suite.pass_at_k:
            title = f"pass@{k} on {suite.suite} problems, percent"
            for part in suite.languages:
                examples = (part.prompts_sha, part.problems, *sampling)
                for row in part.contenders:
                    change = part.to_base.get(row.family, {}).get(k)
                    yield RunMetric(
                        title,
                        part.name,
                        row.family,
                        row.pass_at[k],
                        change,
                        examples,
                        in_percent=True,
                        higher_is_better=True,
                    )


def _speech_metrics(report: Report) -> Iterator[RunMetric]:
    if report.speech is None:
        return
    hashes = {task.name: task.test_hash for task in report.tasks}
    for part in report.speech.languages:
        units = part.contenders[0].rate(part.metric).units
        examples = (hashes.get(part.task), part.metric, part.normalizer, part.clips, units)
        for row in part.contenders:
            difference = part.to_base.get(row.family)
            change = None
            if difference is not None:
                change = difference.rate(part.metric)
            yield RunMetric("Error rate", part.task, row.family, row.rate(part.metric), change, examples)


def _preference_metrics(report: Report) -> Iterator[RunMetric]:
    hashes = {task.name: task.heldout_hash or task.data_hash for task in report.tasks}
    for result in report.preferences:
        examples = (hashes[result.task], result.examples)
        for text in figures_of(result):
            # margins and losses grow with beta; shares do not
            setting = "" if text.in_percent else setting_of(result)
            title = f"{text.name.capitalize()} on held-out preferences"
            if text.in_percent:
                title += ", percent"
            for row, value, difference in values_of(result, text):
                yield RunMetric(
                    title,
                    result.task,
                    row.family,
                    value,
                    difference,
                    examples,
                    setting=setting,
                    in_percent=text.in_percent,
                    higher_is_better=not text.lower_is_better,
                )


def _heldout_hashes(report: Report) -> dict[str, str]:
    """Task -> hash of the rows that its results are of: with labels, its test rows if it has some."""
    hashes = {task.name: task.heldout_hash or task.data_hash for task in report.tasks}
    labelled = tasks_of_labels(report)
    for task in report.tasks:
        if task.name in labelled and task.test_hash is not None:
            hashes[task.name] = task.test_hash
    return hashes


def _figure_metrics(report: Report) -> Iterator[RunMetric]:
    hashes = _heldout_hashes(report)
    for result in report.figures:
        text = text_of(result)
        title = f"{text.title} on held-out examples"
        if text.in_percent:
            title += ", percent"
        for row, difference in rows_of(result):
            yield RunMetric(
                title,
                result.task,
                row.family,
                row.value,
                difference,
                (hashes[result.task], result.examples, result.setting),
                in_percent=text.in_percent,
                higher_is_better=not result.lower_is_better,
            )


def _row(what: tuple[str, str], metrics: Mapping[int, RunMetric], groups: Sequence[Sequence[int]]) -> Row:
    """metrics: run -> its metric."""
    best: Sequence[int] = []
    if len({metric.examples for metric in metrics.values()}) > 1:
        note = "not of the same examples"
    elif len({metric.setting for metric in metrics.values()}) > 1:
        note = "with another objective or beta"
    else:
        best, note = _best_group(metrics, groups), ""
    cells: list[Cell | None] = [None] * sum(map(len, groups))
    for i, metric in metrics.items():
        cells[i] = _cell(metric, i in best)
    seeds = [_over_seeds(metrics, group) for group in groups if len(group) > 1]
    return Row(what, cells, note, seeds)


def _best_group(metrics: Mapping[int, RunMetric], groups: Sequence[Sequence[int]]) -> Sequence[int]:
    """The runs whose intervals are all better than those of all other runs; [] if there are none."""
    bounds: dict[int, tuple[float, float]] = {}
    for i, metric in metrics.items():
        if metric.compared.finite is None:
            return []
        _, low, high = metric.compared.finite
        bounds[i] = (-high, -low) if metric.higher_is_better else (low, high)
    for group in groups:
        inside = [bounds[i] for i in group if i in bounds]
        outside = [bound for i, bound in bounds.items() if i not in group]
        if inside and outside and max(high for _, high in inside) < min(low for low, _ in outside):
            return group
    return []


def _over_seeds(metrics: Mapping[int, RunMetric], group: Sequence[int]) -> str:
    """Mean and range over the runs of one configuration; "" where one of them lacks the metric."""
    values = []
    for i in group:
        if i not in metrics or metrics[i].estimate.value is None:
            return ""
        values.append(metrics[i].estimate.value)
    known = [value for value in values if value is not None]
    in_percent = metrics[group[0]].in_percent
    mean, low, high = (_write(value, in_percent) for value in (fmean(known), min(known), max(known)))
    return f"{mean} ({low} to {high})"


def _cell(metric: RunMetric, best: bool) -> Cell:
    sign = "+"
    if metric.change is None:
        sign = ""

    def write(value: float) -> str:
        return _write(value, metric.in_percent, sign)

    change = bracketed(metric.compared, write)
    if metric.change is None:
        change = change.partition(" ")[2]
    write_mean = mean_share if metric.in_percent else mean_number
    return Cell(write_mean(metric.estimate), change, best)


def _write(value: float | None, as_percent: bool, sign: str = "") -> str:
    return share(value, sign) if as_percent else number(value, 3, sign)


def _gibibytes(value: int | None) -> str:
    if value is None:
        return ABSENT
    return f"{value / 2**30:.1f} GiB"
