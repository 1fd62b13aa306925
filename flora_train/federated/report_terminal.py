"""The tables that a terminal shows when a federated run ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flora_train.config.terminal_text import in_cell, print_table, shown
from flora_train.evaluation.report.figure_tables import ascii_figure
from flora_train.evaluation.report.formatting import plural
from flora_train.federated.report_tables import (
    failed_rounds,
    figure_text,
    mebibytes,
    missing_updates,
    seconds_of,
    sent_by,
)
from flora_train.federated.result_types import FederatedReport, StrategyResult
from flora_train.runtime.progress import duration


def print_federated(report: FederatedReport, console: Console | None = None) -> None:
    """Figures of the global adapters, bytes and time of every strategy, and what went wrong. Fits 80 columns,
    where names are short."""
    console = console or Console(soft_wrap=True)
    counts = f"{plural(report.num_clients, 'client')}, {plural(report.rounds, 'round')}"
    console.print()
    console.print(shown(f"{report.name}: {counts}; {_reading(report)}", "bold", keep=""))
    headings = [figure_text(name).name for name in report.figures]
    if headings:
        headings[0] += f" [{100 * report.confidence:.3g}%]"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("strategy")
    for heading in (*headings, "MiB sent", "time"):
        table.add_column(heading, justify="right")
    for strategy in report.strategies:
        table.add_row(
            in_cell(strategy.name), *_figures(report, strategy), sent_text(strategy), time_text(strategy)
        )
    print_table(table, console)
    for line in _lines_below(report):
        console.print(shown(line, keep=""))


def _reading(report: FederatedReport) -> str:
    """How the figures are to be read."""
    if not report.figures:
        return "no held-out examples"
    direction = "lower" if report.lower_is_better else "higher"
    unit = ", in percent" if figure_text(report.figures[0]).in_percent else ""
    return f"{direction} is better{unit}"


def _figures(report: FederatedReport, strategy: StrategyResult) -> list[str]:
    """The first figure with its interval; those of the others would not fit 80 columns."""
    cells = [ascii_figure(strategy.figures[name], figure_text(name)) for name in report.figures]
    return cells[:1] + [cell.partition(" [")[0] for cell in cells[1:]]


def _lines_below(report: FederatedReport) -> Iterator[str]:
    """Failed rounds, and clients whose updates are part of no average: a line for each strategy that has
    some."""
    for strategy in report.strategies:
        parts = []
        if failed := failed_rounds(strategy):
            parts.append(f"{plural(failed, 'round')} changed nothing")
        if missing := missing_updates(strategy):
            parts.append(f"{plural(missing, 'update')} left out ({_common_reason(strategy)})")
        if parts:
            yield f"{strategy.name}: {', '.join(parts)}"


def _common_reason(strategy: StrategyResult) -> str:
    """Why most of the missing updates are missing."""
    reasons: Counter[str] = Counter()
    for seed in strategy.seeds:
        for own in seed.rounds:
            reasons.update(incident.reason for incident in own.incidents)
    (reason, _), *others = reasons.most_common()
    if others:
        return f"mostly: {reason}"
    return reason


def sent_text(strategy: StrategyResult) -> str:
    """MiB that clients and server sent, mean over seeds; `-` where nothing is sent."""
    if strategy.central:
        return "-"
    return mebibytes(sum(sent_by(strategy)))


def time_text(strategy: StrategyResult) -> str:
    """Time of all rounds, mean over seeds."""
    return duration(sum(seconds_of(strategy)))
