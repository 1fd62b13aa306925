"""A run that is killed (SIGKILL) goes on with resume=true and ends with the bytes of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Launch, launch_command, launch_environment
from tests.e2e.test_run import adapter_bytes

WORDS = ("training.steps=120", "training.checkpoint_every=10", "evaluation.every=40")

Kill = Callable[..., None]


@pytest.fixture
def kill_after() -> Kill:
    """Start a run and kill it, with all its processes, as soon as a checkpoint of `step` or later is there."""

    def kill(step: int, folder: Path, *words: str, processes: int = 1) -> None:
        with subprocess.Popen(
            launch_command(*words, processes=processes),
            cwd=ROOT,
            env=launch_environment(folder.parent / "cache"),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        ) as process:
            patience = time.monotonic() + 120
            while not any(int(path.stem.removeprefix("step-")) >= step for path in folder.glob("checkpoints/step-*")):
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert time.monotonic() < patience
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)

    return kill


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_resumes_to_the_bytes_of_an_uninterrupted_one(
    launch: Launch, kill_after: Kill, recipe: Path, tmp_path: Path, processes: int
) -> None:
    words = (f"recipe={recipe}", *WORDS)
    done = launch(*words, f"output_dir={tmp_path / 'whole'}", processes=processes)
    assert done.returncode == 0, done.stderr
    parts = tmp_path / "parts"
    for step in (20, 70):
        kill_after(step, parts, *words, f"output_dir={parts}", "resume=true", processes=processes)
    last = launch(*words, f"output_dir={parts}", "resume=true", processes=processes)
    assert last.returncode == 0, last.stderr
    assert "going on after step" in last.stderr
    assert adapter_bytes(parts) == adapter_bytes(tmp_path / "whole")
    assert not list(parts.rglob("step-*"))


def test_unfinished_run_of_another_configuration_is_refused_before_the_model_loads(
    launch: Launch, kill_after: Kill, recipe: Path, tmp_path: Path
) -> None:
    words = (f"recipe={recipe}", *WORDS, f"output_dir={tmp_path / 'run'}", "resume=true")
    kill_after(10, tmp_path / "run", *words)
    refused = launch(*words, "adapters.lora.rank=3", "model.path=/nowhere")
    assert refused.returncode in (1, 2)
    told = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert [line.split(": was")[0] for line in told] == ["error: model.path = '/nowhere'", "error: adapters.lora.rank = 3"]
