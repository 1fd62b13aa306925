"""The families of transformers whose experts are modules, to whose layers no adapter is attached."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from tests.documents import ROOT
from tests.families import EXPERT_LISTS

LIST = re.compile(
    r"class \w*(?:Experts?|Moe)\w*\(nn\.Module(?:Dict|List)\)|[Ee]xperts? = nn\.Module(?:Dict|List)\("
)
"""A class that is a container of experts, or a container that a module holds its experts in."""


def test_the_documented_families_are_those_of_the_installed_transformers() -> None:
    models = Path(transformers.__file__).parent / "models"
    files = sorted(models.glob("*/modeling_*.py"))
    assert len(files) > 200
    found = {file.parent.name for file in files if LIST.search(file.read_text(encoding="utf-8"))}
    assert found == set(EXPERT_LISTS)
    page = (ROOT / "docs" / "architectures.md").read_text()
    assert all(f"| `{family}` |" in page for family in EXPERT_LISTS)
