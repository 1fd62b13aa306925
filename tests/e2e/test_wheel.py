"""The package as users install it: wheel and sdist contain what a run needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT

SMALL = (
    "training.steps=6",
    "training.tokens_per_step=256",
    "training.tokens_per_microbatch=256",
    "training.max_length=64",
    "evaluation.interval=6",
    "evaluation.max_examples=1",
    "evaluation.max_new_tokens=4",
    "evaluation.problems=[]",
    *(f"tasks.{task}.max_validation_examples=1" for task in ("lua", "perl", "ruby")),
)
MODEL = ROOT / "assets" / "models" / "smollm2-135m"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as pip would, beside the dependencies that are there."""
    site = tmp_path_factory.mktemp("site")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(python: str | Path, folder: Path, *words: str, **environment: str) -> str:
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", **environment}
    done = subprocess.run(
        [str(python), *words], cwd=folder, env=surroundings, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_what_ships_and_nothing_that_was_built_here(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"flora_train/shipped/recipes/{file.name}" for file in (ROOT / "recipes").glob("*.yaml")}
    needed = {
        "data_configs/quickstart.yaml",
        "eval/languages.yaml",
        "assets/code/NOTICE.md",
        "launch/single.yaml",
        "train.py",
    }
    assert (
        recipes
        | {f"flora_train/shipped/{name}" for name in needed}
        | {"flora_train/evaluation/report/report.css"}
        <= names
    )
    assert not [
        name
        for name in names
        if "assets/models/" in name or "_local/" in name or name.startswith(("tests/", "benchmarks/"))
    ]
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "README.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "tests/e2e/test_wheel.py",
        "recipes/quickstart.yaml",
    } <= sources
    assert not [
        name for name in sources if "assets/models/" in name or name.startswith(("outputs/", ".venv/"))
    ]


def test_a_run_needs_nothing_of_the_source_tree(installed: Path, recipe: Path, tmp_path: Path) -> None:
    surroundings = {"PYTHONPATH": str(installed)}
    place = run(
        sys.executable, tmp_path, "-c", "import flora_train; print(flora_train.__file__)", **surroundings
    )
    assert Path(place.strip()).is_relative_to(installed)
    assert "quickstart " in run(sys.executable, tmp_path, "-m", "flora_train", "recipes", **surroundings)
    words = (f"recipe={recipe}", "training.steps=6", "output_dir=here")
    assert "held-out bits per byte" in run(
        sys.executable, tmp_path, "-m", "flora_train", "train", *words, **surroundings
    )
    assert (tmp_path / "here" / "eval" / "report.html").exists()
    assert (tmp_path / "here" / "adapters" / "digits-flora" / "adapter_model.safetensors").exists()


def test_a_model_that_is_not_built_yet_is_named_with_the_script_that_builds_it(
    installed: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flora_train", "train", "recipe=quickstart"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    script = installed / "flora_train" / "shipped" / "assets" / "build_smollm2.py"
    assert script.exists()
    assert f"build it with: python {script} --output assets/models/smollm2-135m" in done.stderr


@pytest.mark.full
def test_an_empty_environment_gets_everything_from_the_wheel(built: Path, tmp_path: Path) -> None:
    """pip, all dependencies, the real model, the quickstart's recipe and data, the console command."""
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    (wheel,) = built.glob("*.whl")
    run(
        binaries / "python",
        tmp_path,
        "-m",
        "pip",
        "install",
        "-q",
        "-c",
        str(ROOT / "constraints.txt"),
        str(wheel),
    )
    run(binaries / "flora-train", tmp_path, "train", "recipe=quickstart", f"model.path={MODEL}", *SMALL)
    assert (tmp_path / "outputs" / "quickstart" / "eval" / "report.html").exists()
