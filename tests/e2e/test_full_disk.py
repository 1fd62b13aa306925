"""A disk that fills up while a run is written: one clear error, and nothing half-written."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.conftest import launch_environment
from tests.forked import python

LIMITED = """
import resource, sys
from flora_train.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main({words}))
"""


def train(recipe: Path, folder: Path, cache: Path, file_limit: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    words = ["train", f"recipe={recipe}", f"output_dir={folder}", "training.log_every=1", "evaluation.every=1"]
    return python("-c", LIMITED.format(limit=file_limit, words=words), environment=launch_environment(cache))


def check_what_is_left(folder: Path) -> None:
    """Every file is readable as a whole, no temporary file remains, and the run does not call itself finished."""
    assert not list(folder.rglob(".*tmp*"))
    assert not json.loads((folder / "run.json").read_text())["finished"]
    for line in (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []:
        json.loads(line)
    for checkpoint in folder.rglob("*.safetensors"):
        assert load_file(checkpoint)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, too small for the run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here (needs root): {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_one_clear_error_and_leaves_nothing_half_written(recipe: Path, small_disk: Path, tmp_path: Path) -> None:
    done = train(recipe, small_disk / "run", tmp_path / "cache")
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert str(small_disk / "run") in done.stderr
    assert "Traceback" not in done.stderr
    check_what_is_left(small_disk / "run")


def test_file_size_limit_is_one_clear_error_and_leaves_nothing_half_written(recipe: Path, tmp_path: Path) -> None:
    done = train(recipe, tmp_path / "run", tmp_path / "cache", file_limit=9000)
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    check_what_is_left(tmp_path / "run")
