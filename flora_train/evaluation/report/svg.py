"""Panels as SVG in the colours of the page around them, and the style of each method."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Point = tuple[float, float]

Draw = Callable[[Axes], None]
"""Draws a panel's content."""

WIDTH = 320
"""Width of a panel in CSS pixels: one fits a phone, three fit a desktop page."""

# Matplotlib draws in placeholder colours, which `_in_page_colours` replaces by CSS variables.
INK, MUTED, RULE, PAPER, FAMILY = "#010101", "#020202", "#030303", "#040404", "#0500"
VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}

COLOURS = 7
"""The page defines the colours --family-0 to --family-6 for light and dark mode."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.6, 1.4, 1.6)))
MARKERS = "os^DvPX*"

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flora_train",
    "font.size": 11,
    "axes.linewidth": 0.8,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class FamilyStyle:
    """Line and marker of a family in all plots: families differ in more than their colour."""

    colour: str
    dash: Any
    marker: str

    @property
    def held_out(self) -> dict[str, Any]:
        """Keyword arguments of a held-out curve. A rim in the page's colour separates crossing curves."""
        rim = {"markersize": 6, "markeredgecolor": PAPER, "markeredgewidth": 0.8}
        return {"color": self.colour, "linestyle": self.dash, "marker": self.marker, "linewidth": 1.5, **rim}


def family_styles(families: Sequence[str]) -> dict[str, FamilyStyle]:
    """Colour, dash and marker of each family, in order."""
    return {
        family: FamilyStyle(f"{FAMILY}{i % COLOURS:02x}", DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, family in enumerate(families)
    }


def draw_svg(
    name: str, size: Point, box: Sequence[float], draw: Draw, *, title: str = "", description: str = ""
) -> Markup:
    """An SVG element for the page, with one pair of axes.

    name: prefix of ids, unique in the page; size: width and height in pixels; box: left and right edge of the
    axes, and the margins below and above them, in pixels. Without a title, screen readers skip the panel.
    """
    width, height = size
    left, right, below, above = box
    text = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72))
        position = (left / width, below / height, (right - left) / width, (height - below - above) / height)
        draw(figure.add_axes(position))
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    body = _in_page_colours(_compacted(text.getvalue(), name))
    role = 'aria-hidden="true"'
    if title:
        role = f'role="img" aria-labelledby="{name}-title {name}-desc"'
        labels = (
            f'<title id="{name}-title">{escape(title)}</title>'
            f'<desc id="{name}-desc">{escape(description)}</desc>'
        )
        body = labels + body
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" {role}>{body}</svg>'
    )


def _compacted(svg: str, name: str) -> str:
    """Matplotlib's drawing without metadata and style sheet; ids are prefixed, coordinates rounded."""
    body = "<g>" + svg.partition('<g id="figure_1">')[2].rpartition("</svg>")[0]
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', body))

    def prefixed(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    def rounded(match: re.Match[str]) -> str:
        return re.sub(r"(\.\d\d)\d+", r"\1", " ".join(match[0].split()))

    body = re.sub(r' id="([\w.-]+)"', prefixed, body)
    body = re.sub(r'(?:xlink:)?(href="|url\()#', rf"\1#{name}-", body)
    body = re.sub(r"font-family:[^;\"]*;? ?|transform=\"rotate\(-0 [^)]*\)\"", "", body)
    body = re.sub(r'(?<= )(?:d|x|y)="[^"]*"', rounded, body)
    return re.sub(r">\s+<", "><", body)


def _in_page_colours(body: str) -> str:
    """Placeholder colours replaced by the page's CSS variables."""
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    return re.sub(rf"{FAMILY}(\w\w)", lambda match: f"var(--family-{int(match[1], 16)})", body)
