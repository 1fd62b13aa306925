"""Reading and writing of report.json, report.html and comparison pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from flora_train.config.errors import user_error
from flora_train.config.json_format import read_object
from flora_train.evaluation.report.published_rows import ComparedTable
from flora_train.evaluation.report.types import SCHEMA_VERSION, Report
from flora_train.evaluation.result_model import validate_results
from flora_train.runtime.atomic import disk_errors, write_atomically
from flora_train.runtime.run_folder import RunFolder

GENERATOR = '<meta name="generator" content="flora_train">'
"""In the first lines of every page that this package writes (head.html.j2)."""


def read_report(folder: RunFolder) -> Report:
    """report.json of a run. Raises UserError if it is missing, damaged or of another version."""
    path = folder.evaluation / "report.json"
    if not path.exists():
        hint = (
            "has no report: the run did not finish. Continue it with resume=true, "
            "or evaluate its best checkpoints with flora-train evaluate"
        )
        raise user_error("run", str(folder.path), hint)
    hint = f"flora-train evaluate {folder.path} writes it again"
    content = read_object(path, hint)
    version = content.get("schema_version", content.get("schema"))
    if isinstance(version, int) and version != SCHEMA_VERSION:
        age = "an older" if version < SCHEMA_VERSION else "a newer"
        reason = (
            f"was written by {age} version of flora-train (schema {version}, "
            f"this version reads {SCHEMA_VERSION})"
        )
        raise user_error(str(path), None, f"{reason}: {hint}")
    if "schema_version" not in content:
        raise user_error(str(path), None, f"is damaged (schema_version is missing): {hint}")
    return validate_results(path, content, Report, hint)


def read_report_if_any(folder: RunFolder) -> Report | None:
    """report.json of a run; None if there is none. Raises UserError if it cannot be read."""
    if not (folder.evaluation / "report.json").exists():
        return None
    return read_report(folder)


def write_report(report: Report, folder: Path, published: Sequence[ComparedTable] = ()) -> Path:
    """Write report.json and the self-contained report.html; returns the path of the page.

    published: tables that the page shows beside the run's figures; report.json does not contain them.
    """
    from flora_train.evaluation.report.html import render_html  # loads matplotlib, which takes a second

    page = render_html(report, published)
    text = json.dumps(report.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "report.json", lambda path: path.write_text(text, encoding="utf-8"))
    html = folder / "report.html"
    write_atomically(html, lambda path: path.write_text(page, encoding="utf-8"))
    return html


def write_comparison(reports: Mapping[str, Report], html: Path) -> None:
    """Write a page that compares runs. reports: label of a run -> its report.

    Raises UserError if `html` exists and was not written by this package.
    """
    from flora_train.evaluation.report.html import render_comparison  # loads matplotlib, which takes a second

    page = render_comparison(reports)
    if html.exists() and not _is_generated(html):
        raise user_error(
            "out", str(html), "exists, and was not written by flora-train report: choose another file"
        )
    if html.name == "report.html" and html.with_name("report.json").exists():
        raise user_error("out", str(html), "is the page of one run: choose another file")
    write_atomically(html, lambda path: path.write_text(page, encoding="utf-8"))


def _is_generated(html: Path) -> bool:
    with disk_errors(html), html.open(encoding="utf-8", errors="replace") as file:
        return GENERATOR in file.read(1000)
