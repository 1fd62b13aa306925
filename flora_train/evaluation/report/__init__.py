"""How is a run shown? report.json, report.html and a table on the terminal, all from the same mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora_train.config.errors import user_error
from flora_train.evaluation.report.html import render_comparison, render_html
from flora_train.runtime.atomic import disk_errors, write_atomically

MARK = '<meta name="generator" content="flora_train">'
"""In the first lines of every page that is ours (head.html.j2)."""


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write report.json and the self-contained report.html; returns the latter's path. Nothing is written if the page cannot be drawn."""
    page = render_html(results)
    write_atomically(
        folder / "report.json",
        lambda path: path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8"),
    )
    html = folder / "report.html"
    write_atomically(html, lambda path: path.write_text(page, encoding="utf-8"))
    return html


def write_comparison(runs: Mapping[str, Mapping[str, Any]], html: Path) -> None:
    """runs: what each is called -> its report.json. Raises UserError if `html` is there and is no page of ours."""
    page = render_comparison(runs)
    if html.exists() and not _is_ours(html):
        raise user_error("out", str(html), "exists, and was not written by flora-train report: choose another")
    if html.name == "report.html" and html.with_name("report.json").exists():
        raise user_error("out", str(html), "is the page of one run: choose another")
    write_atomically(html, lambda path: path.write_text(page, encoding="utf-8"))


def _is_ours(html: Path) -> bool:
    with disk_errors(html), html.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.read(1000)
