"""The tables that a terminal shows when a federated run ends."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flora_train.config.terminal_text import in_cell, print_table, shown
from flora_train.evaluation.report.formatting import ascii_estimate
from flora_train.federated.result_types import FederatedReport, StrategyResult
from flora_train.runtime.progress import duration

MEBIBYTE = 1 << 20


def print_federated(report: FederatedReport, console: Console | None = None) -> None:
    """Figures of the global adapters, bytes and time of every strategy. Fits 80 columns."""
    console = console or Console(soft_wrap=True)
    lower = "lower" if report.lower_is_better else "higher"
    title = f"{report.name}: {report.num_clients} clients, {report.rounds} rounds, {lower} is better"
    console.print(shown(f"\n{title}", "bold"))
    table = Table(box=SIMPLE_HEAD)
    for heading in ("strategy", *report.figures, "MiB sent", "time"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    for strategy in report.strategies:
        figures = [ascii_estimate(strategy.figures[name], 3) for name in report.figures]
        table.add_row(in_cell(strategy.name), *figures, sent_text(strategy), time_text(strategy))
    print_table(table, console)


def sent_text(strategy: StrategyResult) -> str:
    """MiB that clients and server sent, mean over seeds; `-` where nothing is sent."""
    if strategy.central:
        return "-"
    sent = [seed.bytes_up + seed.bytes_down for seed in strategy.seeds]
    return f"{sum(sent) / len(sent) / MEBIBYTE:,.1f}"


def time_text(strategy: StrategyResult) -> str:
    """Time of all rounds, mean over seeds."""
    seconds = [seed.seconds for seed in strategy.seeds]
    return duration(sum(seconds) / len(seconds))
