"""RunResult: a finished run, as `train` returns it, with its report and metrics."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from flora_train.evaluation.report.figure_tables import figure_estimate
from flora_train.evaluation.report.files import read_report
from flora_train.evaluation.report.joined_seeds import with_joined_seeds
from flora_train.evaluation.report.types import Report
from flora_train.federated.build_report import read_federated_report
from flora_train.federated.report_page import PAGE
from flora_train.federated.report_tables import figure_text
from flora_train.federated.report_terminal import sent_text
from flora_train.federated.result_types import FederatedReport
from flora_train.runtime.run_folder import RunFolder, is_federated
from flora_train.training.metrics_table import read_metrics

if TYPE_CHECKING:
    import pandas


class RunResult(os.PathLike[str]):
    """A finished run. It can be used wherever a path is expected, and notebooks show it as a table of its
    results."""

    def __init__(self, path: Path) -> None:
        self.path = path
        """The run folder."""

    @property
    def report(self) -> Report | FederatedReport:
        """The content of eval/report.json; of a federated run, that of eval/federated.json."""
        folder = RunFolder(self.path)
        if is_federated(folder):
            return read_federated_report(folder)
        return read_report(folder)

    @property
    def metrics(self) -> pandas.DataFrame:
        """The metrics of training, see `read_metrics`."""
        return read_metrics(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunResult({str(self.path)!r})"

    def __truediv__(self, name: str | os.PathLike[str]) -> Path:
        return self.path / name

    def _repr_html_(self) -> str:
        """Held-out bits per byte of base and adapters, or figures of federated strategies, and the path of
        the full report."""
        report = self.report
        if isinstance(report, FederatedReport):
            rows, name = _strategy_rows(report), PAGE
        else:
            rows, name = _adapter_rows(report), "report.html"
        page = escape(str(self.path / "eval" / name))
        table = f"<table>{''.join(rows)}</table>"
        return f'<p>{escape(str(self.path))}</p>{table}<p>Report: <a href="{page}">{page}</a></p>'


def _adapter_rows(report: Report) -> list[str]:
    """The base and every adapter."""
    rows = ["<tr><th>task</th><th>method</th><th>held-out bits per byte</th><th>difference to base</th></tr>"]
    for result in with_joined_seeds(report).results:
        rows.append(_table_row(result.task, "base", _number(result.base.bits_per_byte.value), ""))
        for contender in result.contenders:
            value, difference = contender.bits_per_byte, contender.difference_to_base.value
            shown = _number(value.value)
            if value.deviation is not None:
                shown += f" \u00b1 {_number(value.deviation)}"
            rows.append(_table_row(result.task, contender.family, shown, _number(difference, "+")))
    return rows


def _strategy_rows(report: FederatedReport) -> list[str]:
    """Every strategy of a federated run."""
    texts = [figure_text(name) for name in report.figures]
    headings = ["strategy", *(text.name for text in texts), "MiB sent"]
    rows = ["<tr>" + "".join(f"<th>{escape(heading)}</th>" for heading in headings) + "</tr>"]
    for strategy in report.strategies:
        figures = []
        for name, text in zip(report.figures, texts, strict=True):
            figures.append(figure_estimate(strategy.figures[name], text))
        rows.append(_table_row(strategy.name, *figures, sent_text(strategy)))
    return rows


def _table_row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _number(value: float | None, sign: str = "") -> str:
    return "not finite" if value is None else f"{value:{sign}.4f}"
