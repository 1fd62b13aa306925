"""The page of a federated run."""

from __future__ import annotations

from pathlib import Path

from flora_train.federated.result_types import FederatedReport

PAGE = "federated.html"
"""In the folder eval/ of a run."""


def write_page(report: FederatedReport, folder: Path) -> Path:
    """Write the page into a folder."""
    raise NotImplementedError
