"""The figure of the study: accuracy by round, a panel for each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from .runs import StudyRun
from .table import names_of, title

PANEL = (3.4, 2.6)
"""Inches."""
MARKERS = "os^DvPX*"


def write_figure(runs: Sequence[StudyRun], path: Path) -> None:
    """Write an SVG with a panel for each run and a line for each strategy."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flora_train", "font.size": 9}):
        figure = Figure(figsize=(PANEL[0] * len(runs), PANEL[1]), layout="constrained")
        panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
        for panel, run in zip(panels, runs, strict=True):
            for number, name in enumerate(names_of(runs)):
                if name not in run.strategies:
                    continue
                values = run.by_round(run.strategies[name])
                heights = [100 * value for value in values.values()]
                marker = MARKERS[number % len(MARKERS)]
                panel.plot(list(values), heights, marker=marker, markersize=3, linewidth=1, label=name)
            panel.set_title(title(run), fontsize=9)
            panel.set_xlabel("rounds")
            panel.grid(axis="y", linewidth=0.4)
        panels[0].set_ylabel(f"{runs[0].figure}, %")
        panels[-1].legend(fontsize=7)
        figure.savefig(path, format="svg", metadata={"Date": None})
