"""The plots of a federated run: the first figure by round, and against what was sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from flora_train.evaluation.report.formatting import NOT_FINITE
from flora_train.evaluation.report.svg import PAPER, RULE, WIDTH, FamilyStyle, draw_svg
from flora_train.federated.report_tables import MEBIBYTE, figure_text
from flora_train.federated.result_types import FederatedReport, StrategyResult

SPARSE_DASH = (0, (1, 1.6))
"""Line of the first stage of SLoRA."""
BAND = 0.13
"""Opacity of the band of an interval."""
WIDE_RANGE = 20.0
"""From this ratio of the largest to the smallest amount on, amounts have a logarithmic scale."""
MANY_DECADES = 1e4
"""From this ratio on, a logarithmic scale has labels at powers of ten only."""
MOST_MARKERS = 40
"""With more points, not all have a marker."""


@dataclass(frozen=True)
class RoundPoint:
    """The first figure after one round, means over seeds. What is not finite is NaN."""

    round: int
    """From 1."""
    sent: float
    """MiB that clients and server sent until then."""
    value: float
    low: float
    high: float
    is_sparse: bool
    """Whether it is of the first stage of SLoRA."""
    failed: bool
    """Whether the round changed nothing with some seed."""


Position = Callable[[RoundPoint], float]
"""Where a point is on the horizontal axis."""


def round_points(strategy: StrategyResult, figure: str, factor: float = 1.0) -> list[RoundPoint]:
    """The evaluated rounds of a strategy.

    Args:
        strategy: With at least one seed.
        figure: Name of the figure.
        factor: What its values are multiplied by.

    Returns:
        A point for each round that was evaluated with every seed.
    """
    sent = [list(accumulate(own.bytes_up + own.bytes_down for own in seed.rounds)) for seed in strategy.seeds]
    points = []
    for number in range(min(len(seed.rounds) for seed in strategy.seeds)):
        rounds = [seed.rounds[number] for seed in strategy.seeds]
        intervals = [own.figures.get(figure) for own in rounds]
        known = [interval for interval in intervals if interval is not None]
        if len(known) < len(rounds):
            continue
        points.append(
            RoundPoint(
                round=rounds[0].round + 1,
                sent=fmean(own[number] for own in sent) / MEBIBYTE,
                value=factor * _mean(own.value for own in known),
                low=factor * _mean(own.low for own in known),
                high=factor * _mean(own.high for own in known),
                is_sparse=rounds[0].stage == "sparse",
                failed=any(own.failure for own in rounds),
            )
        )
    return points


def _mean(values: Iterable[float | None]) -> float:
    """NaN if a value is missing."""
    return fmean(math.nan if value is None else value for value in values)


def rounds_plot(name: str, report: FederatedReport, styles: Mapping[str, FamilyStyle]) -> Markup:
    """The first figure by round.

    Args:
        name: Prefix of ids, unique in the page.
        report: Of a finished run.
        styles: Of each strategy.

    Returns:
        A line per strategy, with a band for its interval; strategies without rounds as horizontal lines.
    """
    return _plot(name, report, styles, axis="round", position=lambda point: float(point.round))


def sent_plot(name: str, report: FederatedReport, styles: Mapping[str, FamilyStyle]) -> Markup:
    """The first figure against what clients and server sent until then.

    Args:
        name: Prefix of ids, unique in the page.
        report: Of a finished run.
        styles: Of each strategy.

    Returns:
        A line per strategy, as in `rounds_plot`.
    """
    return _plot(name, report, styles, axis="MiB sent", position=lambda point: point.sent)


def _plot(
    name: str,
    report: FederatedReport,
    styles: Mapping[str, FamilyStyle],
    *,
    axis: str,
    position: Position,
) -> Markup:
    """axis: what `position` is."""
    figure = report.figures[0]
    text = figure_text(figure)
    factor = 100.0 if text.in_percent else 1.0
    points = {own.name: round_points(own, figure, factor) for own in report.strategies}
    central = {own.name for own in report.strategies if own.central}
    places = [position(point) for own in points if own not in central for point in points[own]]

    def draw(axes: Axes) -> None:
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        for strategy, own in points.items():
            if strategy in central:
                _draw_level(axes, own, styles[strategy])
            else:
                _draw_band(axes, own, position, style=styles[strategy])
        for strategy, own in points.items():
            if strategy not in central:
                _draw_line(axes, own, position, style=styles[strategy])
        axes.margins(x=0.04, y=0.08)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        _label_places(axes, axis, places)

    ends = [f"{strategy} {_end(own)}" for strategy, own in points.items()]
    size, box = (2 * WIDTH, 280), (42, 2 * WIDTH - 8, 36, 8)
    title = f"{text.title} by {axis}"
    return draw_svg(name, size, box, draw, title=title, description=f"{'; '.join(ends)}.")


def _draw_level(axes: Axes, points: Sequence[RoundPoint], style: FamilyStyle) -> None:
    """A horizontal line at the last value of a strategy without rounds."""
    if points and math.isfinite(points[-1].value):
        axes.axhline(points[-1].value, color=style.colour, linestyle=style.dash, linewidth=1.3)


def _draw_band(axes: Axes, points: Sequence[RoundPoint], position: Position, *, style: FamilyStyle) -> None:
    places = [position(point) for point in points]
    lows, highs = [point.low for point in points], [point.high for point in points]
    if len(points) == 1:
        axes.plot(places * 2, [*lows, *highs], color=style.colour, linewidth=1.8, solid_capstyle="butt")
        return
    axes.fill_between(places, lows, highs, color=style.colour, alpha=BAND, linewidth=0)


def _draw_line(axes: Axes, points: Sequence[RoundPoint], position: Position, *, style: FamilyStyle) -> None:
    """The first stage of SLoRA is dotted, with hollow markers; a cross marks rounds that changed nothing."""
    first = [point for point in points if point.is_sparse]
    second = [point for point in points if not point.is_sparse]
    line = {
        "color": style.colour,
        "linestyle": style.dash,
        "linewidth": 1.5,
        "marker": style.marker,
        "markersize": 6,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.8,
        "markevery": math.ceil(len(points) / MOST_MARKERS) or 1,
    }
    sparse_line = {**line, "linestyle": SPARSE_DASH, "markeredgecolor": style.colour}
    _plot_points(axes, [*first, *second[:1]], position, line={**sparse_line, "marker": ""})
    hollow = {**sparse_line, "linestyle": "", "markerfacecolor": PAPER}
    _plot_points(axes, first, position, line=hollow)
    _plot_points(axes, second, position, line=line)
    failed = [point for point in points if point.failed]
    cross = {"color": style.colour, "marker": "x", "linestyle": "", "markersize": 11, "markeredgewidth": 2.0}
    _plot_points(axes, failed, position, line=cross)


def _plot_points(
    axes: Axes, points: Sequence[RoundPoint], position: Position, *, line: Mapping[str, Any]
) -> None:
    if points:
        axes.plot([position(point) for point in points], [point.value for point in points], **line)


def _label_places(axes: Axes, axis: str, places: Sequence[float]) -> None:
    """The horizontal axis; amounts far apart have a logarithmic scale."""
    axes.set_xlabel(axis, loc="right", labelpad=1)
    if axis == "round":
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        return
    positive = [place for place in places if place > 0]
    if len(positive) == len(places) > 0 and max(positive) > WIDE_RANGE * min(positive):
        axes.set_xscale("log")
        axes.set_xlabel(f"{axis}, logarithmic", loc="right", labelpad=1)
        decimal = max(positive) > MANY_DECADES * min(positive)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decimal else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _end(points: Sequence[RoundPoint]) -> str:
    """The last value, in words."""
    if not points:
        return "was not evaluated"
    last = points[-1]
    if not math.isfinite(last.value):
        return NOT_FINITE
    return f"{last.value:.3g} after round {last.round}"
