"""What the headline recipes ask of the hub, built once and served on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from flora_train.runtime.atomic import user_cache
from tests.headline.build_code import FULL, SHORT, SOURCES, Size, build
from tests.hub_server import Hub, serve

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GATED = ("bigcode/starcoder", "bigcode/the-stack-dedup")
"""Repositories whose terms must be accepted."""


@pytest.fixture(scope="session")
def code_material() -> Path:
    """A tiny StarCoder, The Stack and MultiPL-E, as repositories in folders."""
    return built_code("short", SHORT)


@pytest.fixture(scope="session")
def large_code_material() -> Path:
    """The same with more rows than the recipe reads."""
    return built_code("full", FULL)


@pytest.fixture
def code_hub(code_material: Path) -> Iterator[Hub]:
    """A hub with the repositories of recipe=multipl_e, two of them gated."""
    with serve() as hub:
        add_repositories(hub, code_material)
        yield hub


@pytest.fixture
def large_code_hub(large_code_material: Path) -> Iterator[Hub]:
    with serve() as hub:
        add_repositories(hub, large_code_material)
        yield hub


def add_repositories(hub: Hub, material: Path) -> None:
    """Serve FOLDER/models/ORG/NAME and FOLDER/datasets/ORG/NAME."""
    for repo_type in ("model", "dataset"):
        for folder in sorted((material / f"{repo_type}s").glob("*/*")):
            name = f"{folder.parent.name}/{folder.name}"
            hub.add_folder(name, folder, repo_type, gated=name in GATED)


def built_code(form: str, size: Size) -> Path:
    """The folder of a form in the user's cache, built if it is not there. Warns about languages whose real
    code cannot be had here."""
    prompts = os.environ.get("MULTIPL_E")
    content = hashlib.sha256(f"{form} {prompts}".encode())
    for file in sorted([*HERE.glob("*.py"), *HERE.glob("*.yaml"), ROOT / "data_configs" / "multipl_e.yaml"]):
        if not file.name.startswith("test_"):
            content.update(file.read_bytes())
    folder = user_cache("headline") / f"code-{form}-{content.hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "contents.json").exists() or lacking(folder):
            shutil.rmtree(folder, ignore_errors=True)
            build(folder, size, Path(prompts) if prompts else None)
    for task, reasons in lacking(folder).items():
        warnings.warn(f"no real code of {task} here: {'; '.join(reasons)}", stacklevel=2)
    return folder


def lacking(folder: Path) -> dict[str, list[str]]:
    """Language of the recipe without real code -> why."""
    contents = json.loads((folder / "contents.json").read_text(encoding="utf-8"))
    languages = contents["languages"]
    return {
        task: languages[task]["not used"] for task in SOURCES if languages[task]["sources"] == ["flora_train"]
    }
