"""The plots of training over steps: losses, and shares of the tokens drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from statistics import fmean

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flora_train.evaluation.report.formatting import NOT_FINITE
from flora_train.evaluation.report.plots import shortened
from flora_train.evaluation.report.svg import INK, MUTED, RULE, WIDTH, FamilyStyle, Point, draw_svg
from flora_train.evaluation.report.types import AdapterFacts, Curves

MAX_POINTS = 200
"""Longer training curves are averaged in blocks."""


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
    description = f"Held-out loss: {'; '.join(ends)}."
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


def _label_steps(axes: Axes, ticks: int) -> None:
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, min_n_ticks=1))
    axes.set_xlabel("step", loc="right", labelpad=1)


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
