"""Published figures beside those of a run as CSV, Markdown or LaTeX, and as lines of text."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flora_train.evaluation.report.published_rows import ComparedRow, ComparedTable
from flora_train.evaluation.report.tables import check_table_name, latex_text, markdown_row
from flora_train.evaluation.result_model import Interval
from flora_train.runtime.atomic import write_atomically

ABSENT = "-"
COLUMNS = (
    "table",
    "metric",
    "language",
    "method",
    "family",
    "rank",
    "published",
    "published_deviation",
    "published_difference_to_base",
    "value",
    "low",
    "high",
    "difference_to_base",
    "difference_low",
    "difference_high",
    "clear",
    "confidence",
    "source",
    "setup",
)
"""Of a CSV file. Rates are fractions."""


@dataclass(frozen=True)
class Line:
    """One row of a table as text; the language stands in the first row of its group alone."""

    language: str
    method: str
    published: str
    published_change: str
    value: str
    change: str


def headings(table: ComparedTable) -> list[str]:
    """The headings of the columns of `lines_of`."""
    level = f"{100 * table.confidence:.3g} %"
    return ["language", "method", "published", "to base", "this run", f"to base [{level}]"]


def caption(table: ComparedTable) -> str:
    """What the figures are."""
    return f"{table.title}: {measured_as(table)}"


def measured_as(table: ComparedTable) -> str:
    """Metric, unit and direction."""
    direction = "lower" if table.lower_is_better else "higher"
    return f"{table.metric}, in percent, {direction} is better"


def lines_of(table: ComparedTable) -> Iterator[Line]:
    """The rows of a table, in percent."""
    digits = published_digits(table)
    for language, rows in table.by_language.items():
        name = language
        for row in rows:
            yield Line(
                name, method_label(row), *_published(row, digits), _value(row.value), _change(row.difference)
            )
            name = ""


def method_label(row: ComparedRow) -> str:
    """The family, with the published method where the name does not contain it."""
    if row.method in row.family:
        return row.family
    return f"{row.family} ({row.method})"


def published_digits(table: ComparedTable) -> int:
    """Decimals of the published percentages: as many as the figures have, at most two."""
    digits = 0
    for row in table.rows:
        if row.published is not None:
            decimals = f"{100 * row.published.mean:.2f}".rstrip("0").partition(".")[2]
            digits = max(digits, len(decimals))
    return digits


def published_percent(fraction: float, digits: int, sign: str = "") -> str:
    """A published rate, or a difference of two, in percent."""
    return f"{100 * fraction:{sign}.{digits}f}".replace("-", "\u2212")


def _published(row: ComparedRow, digits: int) -> tuple[str, str]:
    if row.published is None:
        return ABSENT, ""
    value, change = f"{100 * row.published.mean:.{digits}f}", ""
    if row.published.deviation is not None:
        value += f"±{100 * row.published.deviation:.{digits}f}"
    if row.published_difference is not None:
        change = f"{100 * row.published_difference:+.{digits}f}"
    return value, change


def _value(value: Interval | None) -> str:
    if value is None:
        return ABSENT
    return "not finite" if value.value is None else f"{100 * value.value:.1f}"


def _change(difference: Interval | None) -> str:
    if difference is None:
        return ""
    if difference.finite is None:
        return "not finite"
    value, low, high = (f"{100 * bound:+.1f}" for bound in difference.finite)
    return f"{value} [{low}, {high}]"


def as_csv(tables: Sequence[ComparedTable]) -> str:
    """A line per language and method, with the numbers of report.json."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for table in tables:
        for row in table.rows:
            published: list[float | None] = [None, None]
            if row.published is not None:
                published = [row.published.mean, row.published.deviation]
            names = [table.title, table.metric, row.language, row.method, row.family, row.rank]
            figures = [*published, row.published_difference, *_bounds(row.value), *_bounds(row.difference)]
            clear = None if row.difference is None else row.difference.excludes_zero
            writer.writerow([*names, *figures, clear, table.confidence, table.source, table.setup])
    return text.getvalue()


def _bounds(value: Interval | None) -> list[float | None]:
    return [None, None, None] if value is None else [value.value, value.low, value.high]


def as_markdown(tables: Sequence[ComparedTable]) -> str:
    """Each table with what differs from the published set-up."""
    blocks = []
    for table in tables:
        header = headings(table)
        rows = [[_one_line(cell) for cell in _cells(line)] for line in lines_of(table)]
        blocks += [f"**{_one_line(caption(table))}**", "", f"{_one_line(table.setup)}", ""]
        blocks += [markdown_row(header), markdown_row(["---"] * len(header)), *map(markdown_row, rows), ""]
        blocks += [f"Published: {_one_line(table.source)}. {_legend(table)}", ""]
        blocks += [f"- {_one_line(note)}" for note in table.notes]
        blocks.append("")
    return "\n".join(blocks)


def as_latex(tables: Sequence[ComparedTable]) -> str:
    """Tables of booktabs, with what differs from the published set-up in the caption."""
    blocks = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        notes = " ".join([table.setup, f"Published: {table.source}.", _legend(table), *table.notes])
        lines: list[str] = []
        for line in lines_of(table):
            if line.language and lines:
                lines.append("    \\midrule")
            lines.append(f"    {' & '.join(map(_latex_cell, _cells(line)))} \\\\")
        blocks += [
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{latex_text(f'{caption(table)}. {_one_line(notes)}')}}}",
            "  \\begin{tabular}{llrrrr}",
            "    \\toprule",
            f"    {' & '.join(map(latex_text, headings(table)))} \\\\",
            "    \\midrule",
            *lines,
            "    \\bottomrule",
            "  \\end{tabular}",
            "\\end{table}",
        ]
    return "\n".join([*blocks, ""])


FORMATS: dict[str, Callable[[Sequence[ComparedTable]], str]] = {
    ".csv": as_csv,
    ".md": as_markdown,
    ".tex": as_latex,
}


def write_compared(tables: Sequence[ComparedTable], path: Path) -> None:
    """Write the tables in the format of the file's name. Raises UserError."""
    check_table_name(path)
    text = FORMATS[path.suffix](tables)
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def _cells(line: Line) -> list[str]:
    return [
        line.language,
        line.method,
        line.published,
        line.published_change,
        line.value,
        line.change,
    ]


def _latex_cell(text: str) -> str:
    return latex_text(_one_line(text)).replace("±", "$\\pm$")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _legend(table: ComparedTable) -> str:
    level = f"{100 * table.confidence:.3g} %"
    return f"Brackets: {level} interval of the run's paired difference; {ABSENT}: no figure."
