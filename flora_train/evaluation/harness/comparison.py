"""The results of all contenders side by side."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from flora_train.config.terminal_text import in_cell
from flora_train.evaluation.harness.requests import ContenderResults


def side_by_side(results: Mapping[str, ContenderResults]) -> Table:
    """A row per metric of a task or group, a column per contender."""
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "metric", "filter"):
        table.add_column(heading)
    for name in results:
        table.add_column(in_cell(name), justify="right")
    for same in zip(*(entry.metrics for entry in results.values()), strict=True):
        first = same[0]
        values = [metric.value for metric in same]
        cells = (first.task, first.metric, first.filter_name, *values)
        table.add_row(*(in_cell(text) for text in cells))
    return table
