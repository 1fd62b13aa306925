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
from tests.forked import start

LIMITED = """
import resource, sys
from flora_train.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main({words}))
"""


def train(
    recipe: Path, folder: Path, cache: Path, file_limit: int = resource.RLIM_INFINITY, processes: int = 1
) -> list[subprocess.CompletedProcess[str]]:
    words = [
        "train",
        f"recipe={recipe}",
        f"output_dir={folder}",
        "training.log_every=1",
        "evaluation.interval=1",
    ]
    command = ["-c", LIMITED.format(limit=file_limit, words=words)]
    ranks = start(command, launch_environment(cache), processes)
    try:
        return [rank.wait(60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def check_what_is_left(folder: Path) -> None:
    """Every file is readable as a whole, no temporary file remains, and the run does not call itself
    finished."""
    assert not list(folder.rglob(".*tmp*"))
    assert not json.loads((folder / "run.json").read_text())["finished"]
    for line in (
        (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    ):
        json.loads(line)
    for checkpoint in folder.rglob("*.safetensors"):
        assert load_file(checkpoint)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, too small for the run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here (needs root): {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_one_clear_error_and_leaves_nothing_half_written(
    recipe: Path, small_disk: Path, tmp_path: Path
) -> None:
    (done,) = train(recipe, small_disk / "run", tmp_path / "cache")
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert str(small_disk / "run") in done.stderr
    assert "Traceback" not in done.stderr
    check_what_is_left(small_disk / "run")


@pytest.mark.parametrize("processes", [1, 2])
def test_file_size_limit_is_one_clear_error_and_leaves_nothing_half_written(
    recipe: Path, processes: int, tmp_path: Path
) -> None:
    """Of two processes one writes; the other ends, too."""
    done = train(recipe, tmp_path / "run", tmp_path / "cache", 9000, processes)
    assert [one.returncode for one in done] == [2] * processes, done
    assert "the disk is full" in done[0].stderr
    assert not any("Traceback" in one.stderr for one in done)
    check_what_is_left(tmp_path / "run")
