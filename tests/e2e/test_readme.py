"""What README and docs say is what the code does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flora_train.cli import COMMANDS
from flora_train.config.load import load_config, validate
from tests.e2e.conftest import ROOT

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "assets" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = re.sub(r"<!-- figures.*?<!-- end -->", "", README, flags=re.DOTALL)
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", PROSE, flags=re.DOTALL | re.MULTILINE)
COMMAND_LINES = [line for block in BLOCKS for line in block.splitlines() if re.match(r"(make|flora-train|accelerate) ", line)]


def test_readme_has_commands() -> None:
    assert {"make quickstart", "make test"} <= set(COMMAND_LINES)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_of_the_readme_exists(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "accelerate":
        words = words[words.index("train.py") + 1 :]
        assert load_config(words).name == "quickstart"
    else:
        entry = COMMANDS[words[0]]
        assert entry.least <= len(words) - 1
        assert entry.most is None or len(words) - 1 <= entry.most


def test_error_shown_in_the_readme_is_the_one_that_is_printed() -> None:
    block = next(block for block in BLOCKS if block.startswith("$ flora-train"))
    command, expected = block.strip().splitlines()
    words = shlex.split(command.removeprefix("$ flora-train "))
    done = subprocess.run([sys.executable, "-m", "flora_train", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == expected


def test_every_command_has_help_with_an_example_that_fits_a_screen() -> None:
    for words in ([], *([name] for name in COMMANDS)):
        done = subprocess.run([sys.executable, "-m", "flora_train", *words, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0
        assert "Example: flora-train" in done.stdout
        assert len(done.stdout.splitlines()) <= 24
        assert max(map(len, done.stdout.splitlines())) <= (150 if words else 100)


def test_figures_of_the_readme_are_those_of_the_committed_results() -> None:
    done = subprocess.run([sys.executable, "benchmarks/update_figures.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, "run `make figures` and commit README.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_files_named_in_the_tree_of_the_readme_exist() -> None:
    tree = next(block for block in BLOCKS if block.startswith("train.py"))
    names = [word for line in tree.splitlines() for word in re.match(r" *((?:[\w./]+ )+) ", line)[1].split()]  # type: ignore[index]
    inside = set(names[names.index("flora_train/") + 1 :])
    assert len(names) > 15
    for name in names:
        assert (ROOT / ("flora_train" if name in inside else "") / name).exists(), name


def test_recipe_in_the_tasks_document_is_valid() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text()
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0])
    config = validate(recipe)
    assert set(config.tasks) == {"support", "python", "german"}
