"""The targets of the Makefile: what each installs, and in which order."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT

PREREQUISITES = [
    "pyproject.toml",
    "constraints.txt",
    *(f"assets/build_{name}.py" for name in ("minilm", "smollm2", "whisper")),
    "assets/pypi_model.py",
    *(f"assets/{name}.requirements.txt" for name in ("minilm", "smollm2", "whisper")),
    "tests/trl/requirements.txt",
    "tests/lm_eval/requirements.txt",
    "tests/serving/requirements.txt",
    "tests/flower/requirements.txt",
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Makefile and its prerequisites, in which nothing is installed or built."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", *PREREQUISITES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Make as a user calls it, also where `make test` runs these tests: a make below another prints more."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def commands(clone: Path, target: str) -> list[str]:
    """What make would run."""
    done = make(clone, "--dry-run", target)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def position(lines: list[str], word: str) -> int:
    return next(number for number, line in enumerate(lines) if word in line)


@pytest.mark.parametrize("target", ["setup", "quickstart", "sweep"])
def test_runs_need_no_tools_for_development(clone: Path, target: str) -> None:
    lines = commands(clone, target)
    assert not [line for line in lines if "[dev]" in line]
    assert position(lines, "pip install") < position(lines, "build_smollm2.py")


@pytest.mark.parametrize("target", ["test", "test-full", "test-headline", "test-attack", "test-trl"])
def test_tests_install_their_tools_before_they_run(clone: Path, target: str) -> None:
    lines = commands(clone, target)
    assert position(lines, "[dev]") < position(lines, "pytest")


def test_vllm_is_installed_in_an_environment_of_its_own_before_its_tests(clone: Path) -> None:
    lines = commands(clone, "test-serving")
    assert position(lines, "tests/serving/requirements.txt") < position(lines, "-m serving")
    assert not [line for line in lines if "vllm" in line or "[dev]" in line]
    removed = next(line for line in commands(clone, "clean") if line.startswith("rm"))
    assert ".venv-serving" in removed.split()


def test_speech_packages_are_installed_before_anything_is_downloaded(clone: Path) -> None:
    lines = commands(clone, "speech-local")
    assert (
        position(lines, "speech-corpus]")
        < position(lines, "whisper")
        < position(lines, "build_speech_corpus.py")
    )


def test_a_new_environment_does_not_build_the_model_again(clone: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(clone, tmp_path / "copy"))
    manifest = copy / "assets" / "models" / "smollm2-135m" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    assert not [line for line in commands(copy, "setup") if "build_smollm2.py" in line]


def test_help_describes_every_target_in_one_line() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)[0].split()
    done = make(ROOT, "help")
    described = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    assert sorted(described) == sorted(targets)
    assert all(described.values())
