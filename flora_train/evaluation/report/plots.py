"""The plots of intervals, as SVG: a small panel per task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flora_train.evaluation.code.score_types import LanguageScores, MacroScores
from flora_train.evaluation.report.formatting import NOT_FINITE
from flora_train.evaluation.report.svg import INK, MUTED, PAPER, RULE, WIDTH, Draw, FamilyStyle, draw_svg
from flora_train.evaluation.report.types import TaskResult

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
