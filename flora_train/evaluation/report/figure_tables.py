"""Figures of answers, labels and losses as the report shows them: one table per figure, over all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flora_train.evaluation.figures.labels import MAJORITY
from flora_train.evaluation.figures.result_types import ConfusionMatrix, FigureResult, FigureScore
from flora_train.evaluation.figures.texts import FigureText, text_of
from flora_train.evaluation.report.formatting import (
    bracketed,
    count,
    mean_number,
    mean_share,
    number,
    plural,
    share,
    verdict,
)
from flora_train.evaluation.result_model import Interval

BEAT_BASELINES = ("accuracy", "token_accuracy", "micro_f1", "mse")
"""Figures by which adapters are said to beat a baseline or not."""
MOST_CELLS = 20
"""Labels up to which a page shows a confusion matrix as a whole."""


@dataclass(frozen=True)
class FigureTable:
    """One figure of all tasks that have it."""

    figure: str
    text: FigureText
    results: Sequence[FigureResult]

    @property
    def methods(self) -> list[str]:
        """The columns: the base, families, and baselines."""
        names: dict[str, None] = {}
        for result in self.results:
            names |= dict.fromkeys(row.family for row in result.contenders)
        others = [name for name in names if name != "base"]
        baselines: dict[str, None] = {}
        for result in self.results:
            baselines |= dict.fromkeys(row.family for row in result.baselines)
        return [*(["base"] if "base" in names else []), *others, *baselines]

    @property
    def tasks(self) -> list[str]:
        """The rows."""
        return [result.task for result in self.results]

    @property
    def has_differences(self) -> bool:
        """Whether a method is compared with the base."""
        return any(result.to_base for result in self.results)

    @property
    def below(self) -> str:
        """What stands below each value."""
        if not self.has_differences:
            return "Below: the interval of the value"
        if all(result.to_base for result in self.results):
            return "Below: difference to the base; of the base, the interval of its value"
        return "Below: difference to the base, or the interval of the value"

    @property
    def title(self) -> str:
        """Name and direction, such as `Macro F1, higher is better.`"""
        direction = "lower" if self.text.lower_is_better else "higher"
        return f"{self.text.title}, {direction} is better."

    @property
    def facts(self) -> list[tuple[str, str, list[str]]]:
        """Further columns: (heading, class, a cell for each task)."""
        columns = [("examples", "", [count(result.examples) for result in self.results])]
        if any(result.setting for result in self.results):
            columns.append(("setting", "word", [result.setting for result in self.results]))
        return columns


def figure_tables(results: Sequence[FigureResult]) -> list[FigureTable]:
    """A table for each figure, in the order in which figures first occur."""
    by_figure: dict[str, list[FigureResult]] = {}
    for result in results:
        by_figure.setdefault(result.figure, []).append(result)
    return [FigureTable(figure, text_of(group[0]), group) for figure, group in by_figure.items()]


def rows_of(result: FigureResult) -> Iterator[tuple[FigureScore, Interval | None]]:
    """Each contender, mean over seeds and baseline, with the difference to the base if it has one."""
    for row in (*result.contenders, *result.over_seeds):
        yield row, result.to_base.get(row.family)
    for baseline in result.baselines:
        yield baseline, None


def score_of(result: FigureResult, family: str) -> FigureScore | None:
    """The figure of a method or baseline; None if it has none on this task."""
    baselines = {row.family: row for row in result.baselines}
    return result.by_family.get(family) or baselines.get(family)


def figure_value(value: Interval, text: FigureText) -> str:
    """A value, of a mean over seeds with its deviation."""
    return mean_share(value) if text.in_percent else mean_number(value, text.digits)


def figure_estimate(value: Interval, text: FigureText, sign: str = "") -> str:
    """A value, or a difference, with its interval."""

    def write(bound: float) -> str:
        return share(bound, sign) if text.in_percent else number(bound, text.digits, sign)

    return bracketed(value, write)


def ascii_figure(value: Interval, text: FigureText, sign: str = "") -> str:
    """The same for terminals."""
    factor, digits = (100, 1) if text.in_percent else (1, text.digits)
    return bracketed(value, lambda bound: f"{factor * bound:{sign}.{digits}f}", "+/-")


def figure_verdict(difference: Interval, lower_is_better: bool) -> str:
    """What a difference says of the first of two: better, worse, unclear or not finite."""
    return verdict(difference if lower_is_better else difference.negated())


def against_baselines(results: Sequence[FigureResult]) -> list[str]:
    """A sentence for each baseline, which names the adapters that do not clearly beat it, such as `Accuracy
    is not clearly better than that of the majority label for 2 of 3 adapters: flora on spam, lora on spam.`
    """
    cases: dict[tuple[str, str], list[str]] = {}
    totals: dict[tuple[str, str], int] = {}
    for result in results:
        if result.figure not in BEAT_BASELINES:
            continue
        for baseline in result.baselines:
            key = (text_of(result).title, baseline.family)
            for family, difference in result.against(baseline.family).items():
                totals[key] = totals.get(key, 0) + 1
                if figure_verdict(difference, result.lower_is_better) != "better":
                    cases.setdefault(key, []).append(f"{family} on {result.task}")
    sentences = []
    for (figure, name), total in totals.items():
        methods = cases.get((figure, name), [])
        adapters = plural(total, "adapter")
        if not methods:
            sentences.append(
                f"{figure} is clearly better than that of the {name} for {count(total)} of {adapters}."
            )
            continue
        shown = ", ".join(methods[:MOST_CELLS])
        if len(methods) > MOST_CELLS:
            shown += f" and {len(methods) - MOST_CELLS} more"
        sentences.append(
            f"{figure} is not clearly better than that of the {name} for "
            f"{count(len(methods))} of {adapters}: {shown}."
        )
    return sentences


def constant_baselines(results: Sequence[FigureResult]) -> list[str]:
    """Names of the baselines that predict the same for every example."""
    names = dict.fromkeys(row.family for result in results for row in result.baselines)
    return [name for name in names if name in MAJORITY.values()]


def has_undefined(results: Sequence[FigureResult]) -> bool:
    """Whether a figure is not finite."""
    return any(row.value.value is None for result in results for row, _ in rows_of(result))


def is_shown_whole(matrix: ConfusionMatrix) -> bool:
    """Whether a page shows all cells of a matrix, or its largest confusions."""
    return len(matrix.labels) <= MOST_CELLS
