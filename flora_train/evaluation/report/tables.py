"""Results of runs as CSV, Markdown or LaTeX: a row per task and a column per method."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.evaluation.figures.texts import text_of
from flora_train.evaluation.report.figure_tables import rows_of
from flora_train.evaluation.report.formatting import NOT_FINITE, PLUS_MINUS, shared_digits
from flora_train.evaluation.report.joined_report import with_joined_families
from flora_train.evaluation.report.joined_seeds import with_joined_seeds
from flora_train.evaluation.report.preference_figures import examples_of, figures_of, values_of
from flora_train.evaluation.report.types import Report
from flora_train.evaluation.result_model import Interval
from flora_train.runtime.atomic import write_atomically

PERCENT_DIGITS = 1
COLUMNS = (
    "run",
    "metric",
    "task",
    "method",
    "value",
    "low",
    "high",
    "difference_to_base",
    "difference_low",
    "difference_high",
    "clear",
    "examples",
    "confidence",
    "deviation",
)
"""Of a CSV file, which has a line per task and method."""
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


@dataclass(frozen=True)
class Metric:
    """A quantity that a table shows."""

    name: str
    lower_is_better: bool
    digits: int
    in_percent: bool = False
    """Whether Markdown and LaTeX show it times 100."""


@dataclass(frozen=True)
class Score:
    """The value of one metric for one method on one task."""

    run: str
    metric: Metric
    task: str
    method: str
    value: Interval
    difference: Interval | None
    """To the base model; None for the base."""
    examples: int
    confidence: float
    note: str = ""
    """Examples, for Markdown and LaTeX, such as `120 pairs`."""

    @property
    def is_clearly_better(self) -> bool:
        """Whether the method is better than the base by an interval that excludes zero."""
        if self.difference is None or self.difference.value is None or not self.difference.excludes_zero:
            return False
        return (self.difference.value < 0) == self.metric.lower_is_better


def scores_of(reports: Mapping[str, Report]) -> list[Score]:
    """All scores of runs. reports: label of a run -> its report."""
    scores: list[Score] = []
    for run, report in reports.items():
        scores += [*_losses(run, report), *_pass_rates(run, report), *_error_rates(run, report)]
        scores += [*_preferences(run, report), *_figures(run, report)]
    return scores


def _losses(run: str, report: Report) -> Iterator[Score]:
    metric = Metric("held-out bits per byte", lower_is_better=True, digits=shared_digits(report.results))
    for result in report.results:
        common = (result.examples, result.confidence)
        yield Score(run, metric, result.task, "base", result.base.bits_per_byte, None, *common)
        for row in (*result.contenders, *result.over_seeds):
            yield Score(
                run, metric, result.task, row.family, row.bits_per_byte, row.difference_to_base, *common
            )


def _pass_rates(run: str, report: Report) -> Iterator[Score]:
    for suite in report.code:
        for k in suite.pass_at_k:
            metric = Metric(f"pass@{k} on {suite.suite}", False, PERCENT_DIGITS, in_percent=True)
            for part in suite.languages:
                for score in (*part.contenders, *part.over_seeds):
                    difference = part.to_base.get(score.family, {}).get(k)
                    common = (score.pass_at[k], difference, part.problems, suite.confidence)
                    yield Score(run, metric, part.language, score.family, *common)


def _error_rates(run: str, report: Report) -> Iterator[Score]:
    if report.speech is None:
        return
    names = {"wer_normalized": "word error rate", "cer": "character error rate"}
    for part in report.speech.languages:
        metric = Metric(names[part.metric], True, PERCENT_DIGITS, in_percent=True)
        for score in (*part.contenders, *part.over_seeds):
            difference = None
            if score.family in part.to_base:
                difference = part.to_base[score.family].rate(part.metric)
            common = (score.rate(part.metric), difference, part.clips, report.speech.confidence)
            yield Score(run, metric, part.task, score.family, *common)


def _preferences(run: str, report: Report) -> Iterator[Score]:
    for result in report.preferences:
        for text in figures_of(result):
            digits = PERCENT_DIGITS if text.in_percent else 3
            metric = Metric(text.name, text.lower_is_better, digits, in_percent=text.in_percent)
            for row, value, difference in values_of(result, text):
                common = (value, difference, result.examples, result.confidence, examples_of(result))
                yield Score(run, metric, result.task, row.family, *common)


def _figures(run: str, report: Report) -> Iterator[Score]:
    for result in report.figures:
        text = text_of(result)
        digits = PERCENT_DIGITS if text.in_percent else text.digits
        metric = Metric(text.name, result.lower_is_better, digits, in_percent=text.in_percent)
        for row, difference in rows_of(result):
            common = (row.value, difference, result.examples, result.confidence)
            yield Score(run, metric, result.task, row.family, *common)


def as_csv(scores: Sequence[Score]) -> str:
    """A line per task and method, with the numbers of report.json; empty where one is not finite."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for score in scores:
        value, difference = score.value, score.difference
        change: list[float | None] = [None, None, None, None]
        if difference is not None:
            change = [difference.value, difference.low, difference.high, difference.excludes_zero]
        estimate = [value.value, value.low, value.high]
        place = [score.run, score.metric.name, score.task, score.method]
        writer.writerow([*place, *estimate, *change, score.examples, score.confidence, value.deviation])
    return text.getvalue()


def as_markdown(scores: Sequence[Score]) -> str:
    """A table for each metric: tasks x methods, with intervals."""
    lines = []
    for metric, group in _by_metric(scores).items():
        header, rows = _grid(group, _plain_cell)
        lines += [f"**{_title(metric, group)}**", ""]
        lines += [markdown_row(header), markdown_row(["---"] * len(header))]
        lines += [markdown_row(row) for row in rows]
        lines.append("")
    return "\n".join([*lines, _legend(scores), ""])


def as_latex(scores: Sequence[Score]) -> str:
    """A table of booktabs for each metric: tasks x methods, with intervals."""
    blocks = ["% needs \\usepackage{booktabs}"]
    for metric, group in _by_metric(scores).items():
        header, rows = _grid(group, _latex_cell, escape=latex_text)
        names = len(header) - len(_methods(group))
        caption = f"{_title(metric, group)}. {_legend(group)}"
        blocks += [
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{latex_text(caption)}}}",
            f"  \\begin{{tabular}}{{{'l' * names}{'r' * (len(header) - names)}}}",
            "    \\toprule",
            f"    {' & '.join(header)} \\\\",
            "    \\midrule",
            *(f"    {' & '.join(row)} \\\\" for row in rows),
            "    \\bottomrule",
            "  \\end{tabular}",
            "\\end{table}",
        ]
    return "\n".join([*blocks, ""])


FORMATS: dict[str, Callable[[Sequence[Score]], str]] = {".csv": as_csv, ".md": as_markdown, ".tex": as_latex}


def check_table_name(path: Path) -> None:
    """Raises UserError for a name whose ending is no format."""
    if path.suffix not in FORMATS:
        hint = f"must end in {choices(FORMATS)}.{did_you_mean(path.suffix, FORMATS)}"
        raise user_error("table", str(path), hint)


def write_table(reports: Mapping[str, Report], path: Path) -> None:
    """Write the results of runs in the format of the file's name. reports: label of a run -> its report.
    Raises UserError."""
    check_table_name(path)
    shown = reports
    if path.suffix != ".csv":
        shown = {run: with_joined_families(with_joined_seeds(report)) for run, report in reports.items()}
    text = FORMATS[path.suffix](scores_of(shown))
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def _by_metric(scores: Sequence[Score]) -> dict[str, list[Score]]:
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.metric.name, []).append(score)
    return groups


def _methods(scores: Sequence[Score]) -> list[str]:
    names = dict.fromkeys(score.method for score in scores)
    return ["base", *(name for name in names if name != "base")]


def _grid(
    scores: Sequence[Score], cell: Callable[[Score], str], *, escape: Callable[[str], str] = str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the run, if there are several, the task, and a cell per method."""
    methods = _methods(scores)
    cells = {(score.run, score.task, score.method): cell(score) for score in scores}
    notes = {(score.run, score.task): score.note for score in scores}
    with_run = len({score.run for score in scores}) > 1
    rows = []
    for run, task in dict.fromkeys((score.run, score.task) for score in scores):
        note = notes[run, task]
        label = f"{task} ({note})" if note else task
        names = [run, label] if with_run else [label]
        rows.append([*map(escape, names), *(cells.get((run, task, method), "") for method in methods)])
    header = ["run", "task"] if with_run else ["task"]
    return [*header, *map(escape, methods)], rows


def _formatted(score: Score) -> tuple[str, str] | None:
    """Value and interval; None unless they are finite."""
    if score.value.finite is None:
        return None
    factor = 100 if score.metric.in_percent else 1
    value, low, high = (f"{factor * bound:.{score.metric.digits}f}" for bound in score.value.finite)
    if score.value.deviation is not None:
        value += f" {PLUS_MINUS} {factor * score.value.deviation:.{score.metric.digits}f}"
    return value, f"[{low}, {high}]"


def _plain_cell(score: Score) -> str:
    numbers = _formatted(score)
    if numbers is None:
        return NOT_FINITE
    mark = "\\*" if score.is_clearly_better else ""
    return f"{numbers[0]}{mark} {numbers[1]}"


def _latex_cell(score: Score) -> str:
    numbers = _formatted(score)
    if numbers is None:
        return NOT_FINITE
    mark = "$^{*}$" if score.is_clearly_better else ""
    value = numbers[0].replace(PLUS_MINUS, "$\\pm$")
    return f"{value}{mark} {{\\footnotesize {numbers[1]}}}"


def _title(metric: str, scores: Sequence[Score]) -> str:
    first = scores[0].metric
    unit = " (%)" if first.in_percent else ""
    direction = "lower" if first.lower_is_better else "higher"
    return f"{metric}{unit}, {direction} is better"


def _legend(scores: Sequence[Score]) -> str:
    percent = f"{100 * scores[0].confidence:g} %"
    stars = "*: better than the base, by an interval of the difference that excludes zero"
    legend = f"Brackets: {percent} intervals. {stars}."
    if any(score.value.deviation is not None for score in scores):
        legend += f" {PLUS_MINUS}: standard deviation over seeds."
    return legend


def markdown_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def latex_text(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return re.sub(r"[\\~^&%$#_{}]", lambda match: LATEX_SPECIAL[match[0]], text)
