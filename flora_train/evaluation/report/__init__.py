"""How is a run shown? report.json, report.html and a table on the terminal, all from the same mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora_train.atomic import write_atomically
from flora_train.evaluation.report.html import render_comparison, render_html


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write report.json and the self-contained report.html; returns the latter's path."""
    write_atomically(
        folder / "report.json",
        lambda path: path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8"),
    )
    html = folder / "report.html"
    write_atomically(html, lambda path: path.write_text(render_html(results), encoding="utf-8"))
    return html


def write_comparison(runs: Mapping[str, Mapping[str, Any]], html: Path) -> None:
    """runs: what each is called -> its report.json."""
    write_atomically(html, lambda path: path.write_text(render_comparison(runs), encoding="utf-8"))
