"""A tiny run with three adapters. Tests of this folder need lm-evaluation-harness: the mark `lm_eval`."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from flora_train.cli import main
from tests.e2e.conftest import checkpoint, recipe

__all__ = ["checkpoint", "recipe"]  # fixtures

TASKS = Path(__file__).parent / "tasks"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "lm_eval":
            item.add_marker("lm_eval")


@pytest.fixture(autouse=True, scope="session")
def _installed() -> None:
    if find_spec("lm_eval") is None:
        pytest.fail("lm_eval is not installed: run make test-lm-eval")


@pytest.fixture(scope="session")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the task `letters` with fLoRA, LoRA and IA3."""
    folder = tmp_path_factory.mktemp("lm_eval_run")
    content = yaml.safe_load(recipe.read_text())
    content["tasks"] = {"letters": content["tasks"]["letters"]}
    content["training"]["steps"] = 30
    path = folder / "letters.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["train", f"recipe={path}", f"output_dir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks, whose data files have absolute paths."""
    folder = tmp_path_factory.mktemp("tasks")
    for file in TASKS.iterdir():
        if file.suffix == ".yaml":
            text = file.read_text(encoding="utf-8").replace("FOLDER", str(folder))
            (folder / file.name).write_text(text, encoding="utf-8")
        else:
            shutil.copy(file, folder)
    return folder


def documents() -> int:
    """The number of documents of every task."""
    return sum(1 for line in (TASKS / "letters.jsonl").read_text().splitlines() if json.loads(line))
