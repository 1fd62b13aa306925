"""The page of a federated run: self-contained HTML, readable without its script."""

from __future__ import annotations

from pathlib import Path

from flora_train.federated.result_types import FederatedReport
from flora_train.runtime.atomic import write_atomically

PAGE = "federated.html"
"""In the folder eval/ of a run."""


def write_page(report: FederatedReport, folder: Path) -> Path:
    """Write the page of a federated run.

    Args:
        report: The results.
        folder: Where federated.html is written, as a whole.

    Returns:
        The path of the page.

    Raises:
        UserError: The disk is full.
    """
    from flora_train.federated.report_html import render_federated  # loads matplotlib, which takes a second

    page, path = render_federated(report), folder / PAGE
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path
