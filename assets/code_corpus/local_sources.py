"""Reads `local_sources.yaml`: the Debian packages of the corpora that are built locally."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .sources import SOURCES, LanguageSources


def _sources(row: dict[str, Any]) -> LanguageSources:
    """One entry of the table."""
    return LanguageSources(
        suffixes=tuple(row["suffixes"]),
        train=tuple(row["train"]),
        validation=tuple(row["validation"]),
        skipped=re.compile(row["skipped"]),
        few_packages=row.get("few_packages", False),
    )


_TABLE = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
LOCAL_SOURCES = {language: _sources(row) for language, row in yaml.safe_load(_TABLE).items()}
ALL_SOURCES = SOURCES | LOCAL_SOURCES
