"""What do the report's figures look like? One small SVG panel per task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flora_train.evaluation.report.svg import INK, MUTED, PAPER, RULE, WIDTH, FamilyStyle, Point, draw_svg

MAX_POINTS = 200
"""Longer training curves are averaged in blocks."""


def legend_key(name: str, style: FamilyStyle) -> Markup:
    """Line and marker of one family, 40 by 14 pixels."""

    def draw(axes: Axes) -> None:
        axes.axis("off")
        axes.plot([0, 0.5, 1], [0.5, 0.5, 0.5], markevery=[1], **style.held_out)
        axes.set(xlim=(0, 1), ylim=(0, 1))

    return draw_svg(name, (40, 14), (2, 38, 1, 1), draw)


def difference_range(results: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """The x axis of all difference panels: zero and every interval within five times their median extent."""
    found = [_finite(c["difference_to_base"]) for r in results for c in r["contenders"]]
    extents = {estimate: max(map(abs, estimate)) for estimate in found if estimate is not None}
    cap = 5 * median(extents.values()) if extents else 0.0
    shown = [estimate for estimate, extent in extents.items() if extent <= cap]
    low, high = min([0.0, *(e[1] for e in shown)]), max([0.0, *(e[2] for e in shown)])
    room = 0.08 * (high - low) or 0.01
    beyond = [estimate[0] for estimate, extent in extents.items() if extent > cap]
    return low - room * (4 if min(beyond, default=0.0) < 0 else 1), high + room * (4 if max(beyond, default=0.0) > 0 else 1)


def difference_panel(
    name: str, result: Mapping[str, Any], styles: Mapping[str, FamilyStyle], limits: tuple[float, float]
) -> Markup:
    """Difference to the base in bits per byte, one row per family: a point and its interval."""
    rows = result["contenders"]
    labels = [_shortened(c["family"]) for c in rows]
    left = 14 + 6.4 * max(len(label) for label in labels)

    def draw(axes: Axes) -> None:
        low, high = limits
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        for y, contender in enumerate(rows):
            look, estimate = styles[contender["family"]], _finite(contender["difference_to_base"])
            if estimate is None:
                axes.text(low, y, " not finite", color=MUTED, va="center", style="italic")
                continue
            axes.plot(estimate[1:], [y, y], color=look.colour, linewidth=1.8, solid_capstyle="butt")
            axes.plot(estimate[0], y, look.marker, color=look.colour, markersize=7, markeredgecolor=PAPER, markeredgewidth=0.8)
            for edge, beyond, arrow, side in ((low, estimate[1] < low, "<", 1), (high, estimate[2] > high, ">", -1)):
                if beyond:
                    axes.plot(edge, y, arrow, color=look.colour, markersize=6, clip_on=False)
                if beyond and not low <= estimate[0] <= high:
                    place = (edge + side * 0.04 * (high - low), y)
                    axes.text(*place, _signed(estimate[0]), ha="left" if side > 0 else "right", va="center")
        axes.set(xlim=limits, ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
        axes.set_yticklabels(labels, color=INK)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)

    title = f"Difference to the base model on {result['task']}"
    spoken = "; ".join(f"{c['family']} {_spoken(_finite(c['difference_to_base']))}" for c in rows)
    description = f"Bits per byte with interval: {spoken}."
    return draw_svg(name, (WIDTH, 30 + 24 * len(rows)), (left, WIDTH - 14, 24, 4), draw, title, description)


def pass_panel(name: str, part: Mapping[str, Any], k: str, styles: Mapping[str, FamilyStyle], top: float) -> Markup:
    """pass@k in percent of every contender in one language, one row each: a point and its interval, on a scale that ends at
    `top`. The base is drawn in the ink of the text."""
    rows = part["contenders"]
    labels = [_shortened(c["family"]) for c in rows]
    estimates = [tuple(100 * c["pass_at"][k][key] for key in ("value", "low", "high")) for c in rows]

    def draw(axes: Axes) -> None:
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        for y, (contender, (value, low, high)) in enumerate(zip(rows, estimates, strict=True)):
            look = styles.get(contender["family"], FamilyStyle(INK, "-", "|"))
            axes.plot([low, high], [y, y], color=look.colour, linewidth=1.8, solid_capstyle="butt")
            axes.plot(value, y, look.marker, color=look.colour, markersize=7, markeredgecolor=PAPER, markeredgewidth=0.8)
            if contender["family"] not in styles:
                axes.plot(value, y, "|", color=INK, markersize=11, markeredgewidth=2)
        axes.set(xlim=(-2 * top, 104 * top), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
        axes.set_yticklabels(labels, color=INK)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)

    spoken = "; ".join(f"{c['family']} {e[0]:.1f} ({e[1]:.1f} to {e[2]:.1f})" for c, e in zip(rows, estimates, strict=True))
    left = 14 + 6.4 * max(len(label) for label in labels)
    box = (left, WIDTH - 14, 24, 4)
    title = f"pass@{k}: {part['name']}"
    return draw_svg(name, (WIDTH, 30 + 24 * len(rows)), box, draw, title, f"Percent with interval: {spoken}.")


def curve_panel(
    name: str,
    task: str,
    adapters: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Any],
    styles: Mapping[str, FamilyStyle],
) -> Markup:
    """Training loss (thin) and held-out loss (marked) of a task's adapters over steps, the selected step ringed, a cross where one was quarantined, and
    the base model's held-out loss (dotted)."""
    base = curves["base"].get(task)
    series = {(kind, a["name"]): _points(curves[kind].get(a["name"], [])) for kind in ("training", "heldout") for a in adapters}
    losses = [loss for points in series.values() for _, loss in points if not math.isnan(loss)]
    missing = sum(math.isnan(loss) for points in series.values() for _, loss in points)
    losses += [] if base is None else [base]
    ordinary = sorted(losses)[: math.ceil(0.95 * (len(losses) - 1)) + 1] if losses else [0.0]
    ceiling = ordinary[-1] + 1.5 * (ordinary[-1] - ordinary[0])
    cut = bool(losses) and max(losses) > ceiling

    def draw(axes: Axes) -> None:
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        if base is not None:
            axes.axhline(base, color=INK, linewidth=1.0, linestyle=(0, (1, 2)))
        for a in adapters:
            points, look = _averaged(series["training", a["name"]]), styles[a["family"]]
            lone = "x" if len(points) == 1 else ""
            axes.plot(*_columns(points), color=look.colour, alpha=0.42, linewidth=1.0, linestyle=look.dash, marker=lone)
        for a in adapters:
            points, look = series["heldout", a["name"]], styles[a["family"]]
            axes.plot(*_columns(points), **look.held_out)
            if gone := a.get("quarantined"):
                until = [p for p in (series["training", a["name"]] or points) if p[0] <= gone["step"] and not math.isnan(p[1])]
                axes.plot(*_columns(until[-1:]), "x", color=look.colour, markersize=11, markeredgewidth=2.2)
            ring = [point for point in points if point[0] == a["selected_step"]]
            axes.plot(*_columns(ring), "o", color=look.colour, markerfacecolor="none", markersize=12, markeredgewidth=1.2)
        notes = [f"{missing} {'loss is' if missing == 1 else 'losses are'} not finite"] if missing else []
        notes += ["highest losses run off the top"] if cut else []
        notes += [] if series and any(series.values()) else ["nothing was logged"]
        axes.text(0.99, 0.97, "\n".join(notes), transform=axes.transAxes, ha="right", va="top", style="italic", fontsize=10)
        if cut:
            axes.set_ylim(ordinary[0] - 0.1 * (ceiling - ordinary[0]), ceiling)
        axes.margins(x=0.06, y=0.1)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(style="plain", useOffset=False)
        axes.set_xlabel("step", loc="right", labelpad=1)

    title = f"Loss over steps on {task}"
    ends = [
        f"{a['family']} {_end(series['heldout', a['name']])}"
        + (f", quarantined at step {a['quarantined']['step']}" if a.get("quarantined") else "")
        for a in adapters
    ]
    return draw_svg(
        name, (WIDTH, 200), (36, WIDTH - 6, 34, 6), draw, title, f"Held-out loss in nats per token: {'; '.join(ends)}."
    )


def fairness_panel(name: str, drawn: Mapping[str, Sequence[Sequence[float]]], targets: Mapping[str, float]) -> Markup:
    """Each task's share of all tokens drawn so far, as a multiple of the share that the mixture aims at, over steps. The two tasks that end
    farthest from 1 are named."""
    steps = [point[0] for point in next(iter(drawn.values()))]
    totals = [sum(points[i][1] for points in drawn.values()) for i in range(len(steps))]
    ratios = {
        task: [points[i][1] / total / targets[task] if total else 0.0 for i, total in enumerate(totals)]
        for task, points in drawn.items()
        if targets.get(task)
    }
    last = sorted(ratios, key=lambda task: ratios[task][-1])
    named = {last[0]: "top", last[-1]: "bottom"}
    top = max(2.0, max(values[-1] for values in ratios.values()) * 1.1)

    def draw(axes: Axes) -> None:
        axes.axhline(1, color=INK, linewidth=0.9)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        for task, values in ratios.items():
            loud = task in named and len(ratios) > 1
            axes.plot(steps, values, color=INK if loud else MUTED, linewidth=1.4 if loud else 0.8, alpha=1.0 if loud else 0.45)
        for task, side in named.items():
            axes.text(steps[-1], ratios[task][-1], f" {_shortened(task, 10)}", va=side, color=INK, fontsize=10)
        axes.set(xlim=(steps[0], steps[-1] + 0.12 * max(1, steps[-1] - steps[0])), ylim=(0, top))
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.set_xlabel("step", loc="right", labelpad=1)

    spoken = f"At the end {last[0]} has {ratios[last[0]][-1]:.2f} and {last[-1]} {ratios[last[-1]][-1]:.2f} times its share."
    return draw_svg(
        name, (2 * WIDTH, 200), (36, 2 * WIDTH - 6, 34, 6), draw, "Share of tokens drawn so far, against the aim", spoken
    )


def _finite(estimate: Mapping[str, Any]) -> tuple[float, float, float] | None:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    return None if value is None or low is None or high is None else (value, low, high)


def _points(points: Sequence[Sequence[float | None]]) -> list[Point]:
    return [(float(step or 0), math.nan if loss is None else float(loss)) for step, loss in points]


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def _averaged(points: Sequence[Point]) -> list[Point]:
    size = math.ceil(len(points) / MAX_POINTS) or 1
    blocks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(step for step, _ in block), fmean(loss for _, loss in block)) for block in blocks]


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−")


def _spoken(estimate: tuple[float, float, float] | None) -> str:
    return "not finite" if estimate is None else f"{_signed(estimate[0])} ({_signed(estimate[1])} to {_signed(estimate[2])})"


def _end(points: Sequence[Point]) -> str:
    if not points:
        return "not evaluated"
    return "not finite" if math.isnan(points[-1][1]) else f"{points[-1][1]:.3f} at step {points[-1][0]:g}"


def _shortened(label: str, most: int = 18) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
