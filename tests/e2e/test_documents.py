"""README and docs: their length, links, paths, options and generated pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

import flora_train
from flora_train.config.load import validate
from tests.documents import DOCUMENTS, ROOT, blocks, prose, synopses

PATH = re.compile(
    r"`((?:flora_train|tests|benchmarks|recipes|data_configs|launch|docs)/[\w./-]+\.(?:py|yaml|sh|md))`"
)
OPTION = re.compile(r"--[a-z][a-z-]+")
SYNOPSES = sorted(
    text
    for text in set().union(*(synopses(document) for document in DOCUMENTS))
    if text.startswith("flora-train")
)
"""Every description of a command's arguments in the documents."""
OLD_OPTIONS = (
    "evaluation.n=",
    "evaluation.k=",
    "evaluation.every",
    "checkpoint_every",
    "existing_run",
    "start_from",
    "over_long",
    "stand_in",
    "played_clips",
    "guard.spike=",
    "model.sharded",
)
MINIMAL = {
    "name": "document",
    "model": {"path": "assets/models/smollm2-135m"},
    "adapters": {"lora": {"method": "lora", "lr": 1e-3}},
    "training": {"steps": 10},
}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_a_document_exist(document: Path) -> None:
    missing = [path for path in PATH.findall(prose(document)) if not (ROOT / path).exists()]
    assert not missing


def test_pages_that_the_package_names_exist() -> None:
    sources = [
        *(ROOT / "flora_train").rglob("*.py"),
        *(ROOT / "recipes").glob("*.yaml"),
        *(ROOT / "eval").glob("*"),
    ]
    sources += [*(ROOT / "data_configs").glob("*.yaml"), *(ROOT / "tests").rglob("*.py")]
    for source in sources:
        for page in re.findall(r"\bdocs/\w+\.md", source.read_text(encoding="utf-8")):
            assert (ROOT / page).exists(), f"{source.relative_to(ROOT)} names {page}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_has_no_old_option(document: Path) -> None:
    text = prose(document)
    found = [option for option in OLD_OPTIONS if option in text]
    assert not found or document.name == "CHANGELOG.md"


def test_configuration_page_is_up_to_date() -> None:
    command = [sys.executable, "docs/configuration_table.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run `python docs/configuration_table.py`\n{done.stderr}"


def test_configuration_page_has_every_key_with_a_meaning() -> None:
    lines = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    keys = [row.split("`")[1] for row in rows]
    for key in (
        "training.steps",
        "evaluation.interval",
        "tasks.NAME.speech.language",
        "adapters.NAME.init_from",
    ):
        assert key in keys
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    assert not [row for row in cells if not row[-1].strip()], "a key without a meaning"


@pytest.mark.parametrize("name", ["data", "speech", "chat"])
def test_yaml_in_the_pages_is_valid(name: str) -> None:
    page = ROOT / "docs" / f"{name}.md"
    for block in blocks(page, "yaml"):
        recipe = {**MINIMAL, **yaml.safe_load(block.text)}
        config = validate(recipe)
        assert config.tasks


@cache
def help_of(command: str) -> str:
    """The help of a command, on one wide line per option."""
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    program = [sys.executable, "-m", "flora_train", command, "--help"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", sorted({text.split()[1] for text in SYNOPSES}))
def test_options_of_a_command_are_those_of_the_documents(command: str) -> None:
    options = set(OPTION.findall(help_of(command))) - {"--help"}
    for synopsis in SYNOPSES:
        if synopsis.split()[1] == command:
            assert set(OPTION.findall(synopsis)) <= options, synopsis
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    row = " ".join(line for line in page.splitlines() if line.startswith(f"| `flora-train {command}"))
    assert options <= set(OPTION.findall(row)), "an option is missing in docs/commands.md"


def test_guarantees_name_tests_that_exist() -> None:
    guarantees = re.findall(
        r"\[`(test_\w+)\.\.\.`\]\(\.\./([\w/.]+)\)", (ROOT / "docs" / "isolation.md").read_text()
    )
    assert len(guarantees) >= 7
    for prefix, path in guarantees:
        assert f"def {prefix}" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {prefix}..."


def test_every_public_name_is_in_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in flora_train.__all__:
        public = getattr(flora_train, name)
        assert f"::: {public.__module__}.{public.__name__}" in page, name
