"""The plots of sweeps: loss against each swept key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flora_train.evaluation.report.formatting import NOT_FINITE
from flora_train.evaluation.report.svg import INK, MUTED, PAPER, RULE, WIDTH, FamilyStyle, draw_svg
from flora_train.evaluation.report.sweeps import Estimate, Setting, SweepPlot, SweepSeries, written

HEIGHT = 230
LETTER_WIDTH = 7.0
LEAST_RATIO = 4
"""Ratio of the largest to the smallest value from which on the axis is logarithmic."""
DODGE = 0.02
"""Shift between series at the same value, relative to the axis, so that their intervals are not on one
line."""
MOST_DODGE = 0.08


@dataclass(frozen=True)
class _Scale:
    """The horizontal axis: where each value is, from 0 to 1."""

    positions: Mapping[Setting, float]

    def ticks(self) -> list[Setting]:
        """Values whose labels do not touch, from the left."""
        shown: list[Setting] = []
        end = -math.inf
        for value, position in sorted(self.positions.items(), key=lambda item: item[1]):
            half = 0.5 * LETTER_WIDTH * len(written(value)) / (WIDTH - 60)
            if position - half >= end:
                shown.append(value)
                end = position + half + 0.02
        return shown


def sweep_panel(name: str, plot: SweepPlot, heading: str, styles: Mapping[str, FamilyStyle]) -> Markup:
    """Bits per byte of every setting on one task, with intervals, and the base's (dotted).

    heading: name of the swept key; styles: label of a series -> its style.
    """
    scale = _scale([point.x for series in plot.series for point in series.points])
    limits = _limits(plot)
    count = len(plot.series)
    step = min(DODGE, MOST_DODGE / max(1, count - 1))

    def draw(axes: Axes) -> None:
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        if plot.base is not None:
            axes.axhline(plot.base, color=INK, linewidth=1.0, linestyle=(0, (1, 2)))
        for i, series in enumerate(plot.series):
            shift = (i - (count - 1) / 2) * step
            _draw_series(axes, series, scale, shift, style=styles[series.label], limits=limits)
        axes.set(xlim=(-0.1, 1.1), ylim=limits)
        axes.spines["left"].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        ticks = scale.ticks()
        axes.set_xticks([scale.positions[value] for value in ticks], [written(value) for value in ticks])
        axes.set_xlabel(heading, loc="right", labelpad=1)
        missing = sum(point.loss is None for series in plot.series for point in series.points)
        if missing:
            note = f"{missing} {NOT_FINITE}"
            axes.text(
                1, 1.06, note, transform=axes.transAxes, ha="right", va="bottom", style="italic", color=MUTED
            )

    title = f"Bits per byte against {heading} on {plot.task}"
    return draw_svg(
        name, (WIDTH, HEIGHT), (44, WIDTH - 6, 36, 26), draw, title=title, description=_description(plot)
    )


def _scale(values: Sequence[Setting]) -> _Scale:
    numbers = sorted({value for value in values if isinstance(value, float)})
    if len(numbers) < len(set(values)):
        ordered = list(dict.fromkeys(values))
        places = {value: float(i) for i, value in enumerate(ordered)}
    elif numbers[0] > 0 and numbers[-1] / numbers[0] >= LEAST_RATIO:
        places = {value: math.log10(value) for value in numbers}
    else:
        places = {value: value for value in numbers}
    low, high = min(places.values()), max(places.values())
    if high == low:
        return _Scale(dict.fromkeys(places, 0.5))
    return _Scale({value: (place - low) / (high - low) for value, place in places.items()})


def _limits(plot: SweepPlot) -> tuple[float, float]:
    """The vertical axis: the base, and intervals within five times the median distance from the middle."""
    estimates = [point.loss for series in plot.series for point in series.points if point.loss is not None]
    centre = plot.base
    if centre is None:
        centre = median([value for value, _, _ in estimates] or [0.0])
    extents = [max(abs(low - centre), abs(high - centre)) for _, low, high in estimates]
    cap = 5 * median(extents or [0.0])
    shown = [estimate for estimate, extent in zip(estimates, extents, strict=True) if extent <= cap]
    low = min([centre, *(low for _, low, _ in shown)])
    high = max([centre, *(high for _, _, high in shown)])
    margin = 0.1 * (high - low) or 0.01
    above, below = margin, margin
    if any(value > high + margin for value, _, _ in estimates):
        above *= 2
    if any(value < low - margin for value, _, _ in estimates):
        below *= 2
    return low - below, high + above


def _draw_series(
    axes: Axes,
    series: SweepSeries,
    scale: _Scale,
    shift: float,
    *,
    style: FamilyStyle,
    limits: tuple[float, float],
) -> None:
    """Points in the order of their values, joined by a line, with intervals; arrows at the edge for points
    outside."""
    places: list[tuple[float, Estimate]] = []
    for point in series.points:
        if point.loss is not None:
            places.append((scale.positions[point.x] + shift, point.loss))
    places.sort()
    bottom, top = limits
    axes.plot(
        [x for x, _ in places],
        [loss[0] for _, loss in places],
        color=style.colour,
        linewidth=1.0,
        linestyle=style.dash,
    )
    for x, (value, low, high) in places:
        axes.plot([x, x], [low, high], color=style.colour, linewidth=1.6, solid_capstyle="butt")
        if bottom <= value <= top:
            axes.plot(
                x,
                value,
                style.marker,
                color=style.colour,
                markersize=7,
                markeredgecolor=PAPER,
                markeredgewidth=0.8,
            )
        else:
            edge, arrow = bottom, "v"
            if value > top:
                edge, arrow = top, "^"
            axes.plot(x, edge, arrow, color=style.colour, markersize=7, clip_on=False)


def _description(plot: SweepPlot) -> str:
    """The points in words, for screen readers."""
    parts = []
    if plot.base is not None:
        parts.append(f"base {plot.base:.3f}")
    for series in plot.series:
        for point in series.points:
            loss = NOT_FINITE
            if point.loss is not None:
                loss = "{:.3f} ({:.3f} to {:.3f})".format(*point.loss)
            parts.append(f"{series.label} at {written(point.x)}: {loss}")
    return "; ".join(parts) + "."
