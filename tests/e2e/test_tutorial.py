"""docs/tutorial.md, run from top to bottom with smaller steps; the documentation's site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", TUTORIAL, re.S | re.M)
SMALLER = {
    "training.steps=20 training.tokens_per_step=768": "training.steps=5 training.tokens_per_step=192",
    "training.max_length=256": "training.tokens_per_microbatch=192 training.max_length=64",
    "max_validation_examples=10": "max_validation_examples=6",
    "flora-train doctor\n": "",  # run by test_doctor.py
    "evaluation.interval=10": "evaluation.interval=3",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone, in which no file of this repository is overwritten."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("assets", "launch", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.full
def test_the_tutorial_from_top_to_bottom(clone: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
    }
    output = ""
    for language, block in BLOCKS:
        for whole, part in SMALLER.items():
            block = block.replace(whole, part)
        command = ["bash", "-e", "-c", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(
            command, cwd=clone, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        output += done.stdout
    for sign in (
        "6 adapters",
        "Held-out loss: ",
        "local function add(a, b)",
        "YOU/mine  private",
    ):
        assert sign in output
    adapters = {path.name for path in (clone / "outputs" / "mine" / "adapters").iterdir()}
    assert adapters == {
        f"{task}-{method}" for task in ("lua", "ruby", "perl") for method in ("flora", "lora", "ia3")
    }


def test_the_site_is_built_without_a_broken_link(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        assert (tmp_path / "site" / ("" if page.stem == "index" else page.stem) / "index.html").exists()
    reference = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "flora_train.adapters.bank.AdapterBank.attach" in reference
    configuration = (tmp_path / "site" / "configuration" / "index.html").read_text(encoding="utf-8")
    assert "training.tokens_per_microbatch" in configuration
