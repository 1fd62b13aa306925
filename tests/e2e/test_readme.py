"""README and docs agree with the code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flora_train.cli.app import COMMANDS
from tests.documents import DOCUMENTS, ROOT, blocks, commands

CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def test_readme_has_the_two_commands() -> None:
    assert {"make quickstart", "make test"} <= commands(ROOT / "README.md")


def test_error_shown_in_the_documents_is_the_one_that_is_printed() -> None:
    block, *_ = blocks(ROOT / "docs" / "commands.md", "console")
    command, expected = block.text.strip().splitlines()
    words = shlex.split(command.removeprefix("$ flora-train "))
    done = subprocess.run(
        [sys.executable, "-m", "flora_train", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip() == expected


def test_every_command_has_help_with_an_example_that_fits_a_screen() -> None:
    for words in ([], *([name] for name in COMMANDS)):
        done = subprocess.run(
            [sys.executable, "-m", "flora_train", *words, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0
        assert "Example: flora-train" in done.stdout
        assert len(done.stdout.splitlines()) <= (40 if words else 28)
        assert max(map(len, done.stdout.splitlines())) <= 120


def test_figures_of_the_readme_are_those_of_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/update_figures.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, "run `make figures` and commit README.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_files_in_the_repository_layout_exist() -> None:
    tree = next(block.text for block in blocks(CONTRIBUTING, "") if block.text.startswith("train.py"))
    names = [line.split()[0] for line in tree.splitlines()]
    assert len(names) > 15
    package = set(names[names.index("flora_train/") + 1 :])
    for name in names:
        folder = ROOT / "flora_train" if name in package else ROOT
        assert (folder / name).exists(), name


def test_every_package_is_in_the_repository_layout() -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    for path in (ROOT / "flora_train").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"\n  {path.name}/ " in text, path.name
