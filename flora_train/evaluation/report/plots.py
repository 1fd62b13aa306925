"""The plots of the page, as SVG: a small panel per task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from statistics import fmean, median
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flora_train.evaluation.code.score_types import LanguageScores, MacroScores
from flora_train.evaluation.report.formatting import NOT_FINITE
from flora_train.evaluation.report.svg import (
    INK,
    MUTED,
    PAPER,
    RULE,
    WIDTH,
    Draw,
    FamilyStyle,
    Point,
    draw_svg,
)
from flora_train.evaluation.report.types import AdapterFacts, Curves, TaskResult

MAX_POINTS = 200
"""Longer training curves are averaged in blocks."""
ROW_HEIGHT = 24
"""Pixels of a method in the panels of intervals."""
TALL_ROW_HEIGHT = 40
"""Pixels of a method whose label is above its interval."""
LETTER_WIDTH = 6.4
LONGEST_BESIDE = 18
"""Letters of the longest label beside its interval."""
LONGEST_LABEL = 46
"""Letters that fit the width of a panel; the middle of longer labels is left out."""
ABOVE: dict[str, Any] = {
    "xycoords": ("axes fraction", "data"),
    "xytext": (0, 7),
    "textcoords": "offset points",
    "va": "bottom",
    "color": INK,
    "annotation_clip": False,
    "bbox": {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
}
"""Place of a label above its interval."""
BASE_STYLE = FamilyStyle(INK, "-", "|")

Estimate = tuple[float, float, float]
"""Value, low and high."""


def legend_key(name: str, style: FamilyStyle) -> Markup:
    """Line and marker of one family, 40 by 14 pixels."""

    def draw(axes: Axes) -> None:
        axes.axis("off")
        axes.plot([0, 0.5, 1], [0.5, 0.5, 0.5], markevery=[1], **style.held_out)
        axes.set(xlim=(0, 1), ylim=(0, 1))

    return draw_svg(name, (40, 14), (2, 38, 1, 1), draw)


def difference_range(results: Iterable[TaskResult]) -> tuple[float, float]:
    """The x axis of all difference panels: zero and every interval within five times their median extent."""
    extents: dict[Estimate, float] = {}
    for result in results:
        for contender in result.contenders:
            estimate = contender.difference_to_base.finite
            if estimate is not None:
                extents[estimate] = max(map(abs, estimate))
    cap = 5 * median(extents.values()) if extents else 0.0
    shown = [estimate for estimate, extent in extents.items() if extent <= cap]
    outside = [estimate[0] for estimate, extent in extents.items() if extent > cap]
    low = min([0.0, *(estimate[1] for estimate in shown)])
    high = max([0.0, *(estimate[2] for estimate in shown)])
    margin = 0.08 * (high - low) or 0.01
    left, right = margin, margin
    if min(outside, default=0.0) < 0:
        left = 4 * margin
    if max(outside, default=0.0) > 0:
        right = 4 * margin
    return low - left, high + right


def difference_panel(
    name: str, result: TaskResult, styles: Mapping[str, FamilyStyle], limits: tuple[float, float]
) -> Markup:
    """Difference to the base in bits per byte, one row per family: a point and its interval."""
    rows = result.contenders
    labels = [contender.family for contender in rows]
    estimates = [contender.difference_to_base.finite for contender in rows]

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=INK, linewidth=0.9)
        _vertical_grid(axes)
        for y, (contender, estimate) in enumerate(zip(rows, estimates, strict=True)):
            if estimate is None:
                axes.text(limits[0], y, f" {NOT_FINITE}", color=MUTED, va="center", style="italic")
            else:
                _draw_interval(axes, y, estimate, styles[contender.family])
                _mark_outside(axes, y, estimate, styles[contender.family], limits=limits)
        axes.set_xlim(limits)
        _label_rows(axes, labels)

    title = f"Difference to the base model on {result.task}"
    texts = [f"{row.family} {_spoken(estimate)}" for row, estimate in zip(rows, estimates, strict=True)]
    return _interval_panel(name, labels, draw, title, f"Bits per byte with interval: {'; '.join(texts)}.")


def pass_panel(
    name: str,
    language: str,
    part: LanguageScores | MacroScores,
    k: int,
    *,
    styles: Mapping[str, FamilyStyle],
    top: float,
) -> Markup:
    """pass@k in percent of every contender in one language, one row each: a point and its interval.

    The scale ends at `top`. The base is drawn in the colour of the text.
    """
    labels = [contender.family for contender in part.contenders]
    rows: list[tuple[str, Estimate | None]] = []
    for contender in part.contenders:
        estimate = contender.pass_at[k].finite
        if estimate is None:
            rows.append((contender.family, None))
        else:
            value, low, high = estimate
            rows.append((contender.family, (100 * value, 100 * low, 100 * high)))

    def draw(axes: Axes) -> None:
        _vertical_grid(axes)
        for y, (family, estimate) in enumerate(rows):
            if estimate is None:
                axes.text(0, y, f" {NOT_FINITE}", color=MUTED, va="center", style="italic")
                continue
            _draw_interval(axes, y, estimate, styles.get(family, BASE_STYLE))
            if family not in styles:
                axes.plot(estimate[0], y, "|", color=INK, markersize=11, markeredgewidth=2)
        axes.set_xlim(-2 * top, 104 * top)
        _label_rows(axes, labels)

    texts = []
    for family, estimate in rows:
        if estimate is None:
            texts.append(f"{family} {NOT_FINITE}")
        else:
            texts.append("{} {:.1f} ({:.1f} to {:.1f})".format(family, *estimate))
    description = f"Percent with interval: {'; '.join(texts)}."
    return _interval_panel(name, labels, draw, f"pass@{k}: {language}", description)


def curve_panel(
    name: str, task: str, adapters: Sequence[AdapterFacts], curves: Curves, styles: Mapping[str, FamilyStyle]
) -> Markup:
    """Losses of a task's adapters over steps: training (thin) and held-out (marked), and the base's (dotted).

    The selected step is ringed, and a cross shows where an adapter was quarantined.
    """
    base = curves.base.get(task)
    training = {adapter.name: _points(curves.training.get(adapter.name, ())) for adapter in adapters}
    heldout = {adapter.name: _points(curves.heldout.get(adapter.name, ())) for adapter in adapters}
    losses = [loss for _, loss in chain(*training.values(), *heldout.values())]
    finite = [loss for loss in losses if not math.isnan(loss)]
    missing = len(losses) - len(finite)
    if base is not None:
        finite.append(base)
    scale = _loss_scale(finite)
    notes = _curve_notes(missing, cut=scale is not None, empty=not losses)

    def draw(axes: Axes) -> None:
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        if base is not None:
            axes.axhline(base, color=INK, linewidth=1.0, linestyle=(0, (1, 2)))
        for adapter in adapters:
            _draw_training_curve(axes, training[adapter.name], styles[adapter.family])
        for adapter in adapters:
            _draw_heldout_curve(
                axes, adapter, training[adapter.name], heldout[adapter.name], style=styles[adapter.family]
            )
        text = "\n".join(notes)
        axes.text(
            0.99, 0.97, text, transform=axes.transAxes, ha="right", va="top", style="italic", fontsize=10
        )
        if scale is not None:
            axes.set_ylim(*scale)
        axes.margins(x=0.06, y=0.1)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(style="plain", useOffset=False)
        _label_steps(axes, 5)

    ends = [_curve_end(adapter, heldout[adapter.name]) for adapter in adapters]
    description = f"Held-out loss in nats per token: {'; '.join(ends)}."
    return draw_svg(
        name,
        (WIDTH, 200),
        (36, WIDTH - 6, 34, 6),
        draw,
        title=f"Loss over steps on {task}",
        description=description,
    )


def fairness_panel(
    name: str, drawn: Mapping[str, Sequence[tuple[int, int]]], targets: Mapping[str, float]
) -> Markup:
    """Each task's share of all tokens drawn so far, as a multiple of its target share, over steps.

    The two tasks that end farthest from 1 are named.
    """
    steps = [step for step, _ in next(iter(drawn.values()))]
    tokens = {}
    for task, points in drawn.items():
        tokens[task] = [count for _, count in points]
    totals = [sum(counts) for counts in zip(*tokens.values(), strict=True)]
    ratios: dict[str, list[float]] = {}
    for task, counts in tokens.items():
        if targets.get(task):
            shares = [count / max(1, total) for count, total in zip(counts, totals, strict=True)]
            ratios[task] = [share / targets[task] for share in shares]
    ordered = sorted(ratios, key=lambda task: ratios[task][-1])
    lowest, highest = ordered[0], ordered[-1]
    top = max(2.0, ratios[highest][-1] * 1.1)

    def draw(axes: Axes) -> None:
        axes.axhline(1, color=INK, linewidth=0.9)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        for task, values in ratios.items():
            if task in (lowest, highest) and len(ratios) > 1:
                axes.plot(steps, values, color=INK, linewidth=1.4)
            else:
                axes.plot(steps, values, color=MUTED, linewidth=0.8, alpha=0.45)
        for task, side in {lowest: "top", highest: "bottom"}.items():
            axes.text(steps[-1], ratios[task][-1], f" {shortened(task, 12)}", va=side, color=INK, fontsize=10)
        axes.set(xlim=(steps[0], steps[-1] + 0.12 * max(1, steps[-1] - steps[0])), ylim=(0, top))
        _label_steps(axes, 6)

    last = {task: f"{ratios[task][-1]:.2f}" for task in (lowest, highest)}
    description = f"At the end {lowest} has {last[lowest]} and {highest} {last[highest]} times its share."
    title = "Share of tokens drawn so far, relative to the target"
    size, box = (2 * WIDTH, 200), (36, 2 * WIDTH - 6, 34, 6)
    return draw_svg(name, size, box, draw, title=title, description=description)


def _interval_panel(name: str, labels: Sequence[str], draw: Draw, title: str, description: str) -> Markup:
    """A panel of one row per label."""
    left, height = 14 + LETTER_WIDTH * max(map(len, labels), default=0), ROW_HEIGHT
    if _above(labels):
        left, height = 14, TALL_ROW_HEIGHT
    size, box = (WIDTH, 30 + height * len(labels)), (left, WIDTH - 14, 24, 4)
    return draw_svg(name, size, box, draw, title=title, description=description)


def _above(labels: Sequence[str]) -> bool:
    """Whether labels are above the intervals, as one of them is too long to be beside them."""
    return max(map(len, labels), default=0) > LONGEST_BESIDE


def _vertical_grid(axes: Axes) -> None:
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    if _above(labels):
        axes.set(ylim=(len(labels) - 0.5, -0.75), yticks=[])
        for y, label in enumerate(labels):
            axes.annotate(shortened(label, LONGEST_LABEL), (0, y), **ABOVE)
    else:
        axes.set(ylim=(len(labels) - 0.4, -0.6), yticks=range(len(labels)))
        axes.set_yticklabels(labels, color=INK)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)


def _label_steps(axes: Axes, ticks: int) -> None:
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, min_n_ticks=1))
    axes.set_xlabel("step", loc="right", labelpad=1)


def _draw_interval(axes: Axes, y: int, estimate: Estimate, style: FamilyStyle) -> None:
    value, low, high = estimate
    axes.plot([low, high], [y, y], color=style.colour, linewidth=1.8, solid_capstyle="butt")
    axes.plot(
        value, y, style.marker, color=style.colour, markersize=7, markeredgecolor=PAPER, markeredgewidth=0.8
    )


def _mark_outside(
    axes: Axes, y: int, estimate: Estimate, style: FamilyStyle, *, limits: tuple[float, float]
) -> None:
    """An arrow at the edge that an interval crosses, and the value if it is outside."""
    (value, low, high), (left, right) = estimate, limits
    outside = not left <= value <= right
    offset = 0.04 * (right - left)
    if low < left:
        axes.plot(left, y, "<", color=style.colour, markersize=6, clip_on=False)
        if outside:
            axes.text(left + offset, y, _signed(value), ha="left", va="center")
    if high > right:
        axes.plot(right, y, ">", color=style.colour, markersize=6, clip_on=False)
        if outside:
            axes.text(right - offset, y, _signed(value), ha="right", va="center")


def _loss_scale(losses: Sequence[float]) -> tuple[float, float] | None:
    """The y axis that keeps 95 % of the losses readable; None if it shows all of them."""
    if not losses:
        return None
    ordinary = sorted(losses)[: math.ceil(0.95 * (len(losses) - 1)) + 1]
    ceiling = ordinary[-1] + 1.5 * (ordinary[-1] - ordinary[0])
    if max(losses) <= ceiling:
        return None
    return ordinary[0] - 0.1 * (ceiling - ordinary[0]), ceiling


def _curve_notes(missing: int, *, cut: bool, empty: bool) -> list[str]:
    notes = []
    if missing:
        subject = "1 loss is" if missing == 1 else f"{missing} losses are"
        notes.append(f"{subject} {NOT_FINITE}")
    if cut:
        notes.append("highest losses run off the top")
    if empty:
        notes.append("nothing was logged")
    return notes


def _draw_training_curve(axes: Axes, points: Sequence[Point], style: FamilyStyle) -> None:
    points = _averaged(points)
    marker = ""
    if len(points) == 1:
        marker = "x"
    columns = _columns(points)
    axes.plot(*columns, color=style.colour, alpha=0.42, linewidth=1.0, linestyle=style.dash, marker=marker)


def _draw_heldout_curve(
    axes: Axes,
    adapter: AdapterFacts,
    training: Sequence[Point],
    heldout: Sequence[Point],
    *,
    style: FamilyStyle,
) -> None:
    axes.plot(*_columns(heldout), **style.held_out)
    if adapter.quarantined is not None:
        end = adapter.quarantined.step
        before = [point for point in training or heldout if point[0] <= end and not math.isnan(point[1])]
        axes.plot(*_columns(before[-1:]), "x", color=style.colour, markersize=11, markeredgewidth=2.2)
    selected = [point for point in heldout if point[0] == adapter.selected_step]
    axes.plot(
        *_columns(selected),
        "o",
        color=style.colour,
        markerfacecolor="none",
        markersize=12,
        markeredgewidth=1.2,
    )


def _curve_end(adapter: AdapterFacts, points: Sequence[Point]) -> str:
    """A curve's last value, in words."""
    if not points:
        end = "not evaluated"
    elif math.isnan(points[-1][1]):
        end = NOT_FINITE
    else:
        end = f"{points[-1][1]:.3f} at step {points[-1][0]:g}"
    if adapter.quarantined is not None:
        end += f", quarantined at step {adapter.quarantined.step}"
    return f"{adapter.family} {end}"


def _points(points: Iterable[tuple[int, float | None]]) -> list[Point]:
    return [(float(step), math.nan if loss is None else loss) for step, loss in points]


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def _averaged(points: Sequence[Point]) -> list[Point]:
    size = math.ceil(len(points) / MAX_POINTS) or 1
    averaged = []
    for start in range(0, len(points), size):
        steps, losses = _columns(points[start : start + size])
        averaged.append((fmean(steps), fmean(losses)))
    return averaged


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−")


def _spoken(estimate: Estimate | None) -> str:
    """An estimate for the description that a screen reader reads."""
    if estimate is None:
        return NOT_FINITE
    value, low, high = map(_signed, estimate)
    return f"{value} ({low} to {high})"


def shortened(label: str, limit: int) -> str:
    """A label of at most `limit` letters. Names of a sweep differ at the end, so the middle is left out."""
    if len(label) <= limit:
        return label
    end = limit // 2
    return f"{label[: limit - end - 1]}…{label[-end:]}"
