"""What are the report's figures drawn on? SVG in the colours of the page around it, one look per method."""

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

WIDTH = 320
"""Of a panel, in CSS pixels: it fits a phone, and three fit a desktop page."""

# matplotlib knows no CSS variables: it draws in colours that nobody else uses, and `_svg` puts the variables in their place
INK, MUTED, RULE, PAPER, FAMILY = "#010101", "#020202", "#030303", "#040404", "#0500"
VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}

COLOURS = 7
"""The page defines --family-0 to --family-6, for light and dark."""
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
    """How a family is drawn everywhere: never told by its colour alone."""

    colour: str
    dash: Any
    marker: str

    @property
    def held_out(self) -> dict[str, Any]:
        """Keywords of a held-out curve: markers keep the page's colour as a rim, so that crossing curves stay apart."""
        rim = {"markersize": 6, "markeredgecolor": PAPER, "markeredgewidth": 0.8}
        return {"color": self.colour, "linestyle": self.dash, "marker": self.marker, "linewidth": 1.5, **rim}


def family_styles(families: Sequence[str]) -> dict[str, FamilyStyle]:
    """Colour, dash and marker per family, in order."""
    return {
        family: FamilyStyle(f"{FAMILY}{i % COLOURS:02x}", DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, family in enumerate(families)
    }


def draw_svg(
    name: str, size: Point, box: Sequence[float], draw: Callable[[Axes], None], title: str = "", description: str = ""
) -> Markup:
    """Draw one axes and make its SVG part of a page. size: width, height; box: left, right, and what is left free
    below and above, in pixels; name: prefix of ids, unique in the page. Without a title the figure is decoration."""
    width, height = size
    left, right, below, above = box
    text = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72))
        place = (left / width, below / height, (right - left) / width, (height - below - above) / height)
        draw(figure.add_axes(place))
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    # without the head: metadata, and a style that would reach the whole page
    body = "<g>" + text.getvalue().partition('<g id="figure_1">')[2].rpartition("</svg>")[0]
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', body))
    body = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(?:xlink:)?(href="|url\()#', rf"\1#{name}-", body)
    body = re.sub(r"font-family:[^;\"]*;? ?|transform=\"rotate\(-0 [^)]*\)\"", "", body)
    body = re.sub(r'(?<= )(?:d|x|y)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(m[0].split())), body)
    body = re.sub(r">\s+<", "><", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    body = re.sub(rf"{FAMILY}(\w\w)", lambda m: f"var(--family-{int(m[1], 16)})", body)
    role = 'aria-hidden="true"'
    if title:
        role = f'role="img" aria-labelledby="{name}-title {name}-desc"'
        body = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>{body}'
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" {role}>{body}</svg>')
