"""launch/supervise.sh restarts a run until it has ended; the decisions of launch/slurm.sh."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import ROOT, Launch, launch_command, launch_environment
from tests.e2e.test_run import adapter_bytes

SUPERVISE = str(ROOT / "launch" / "supervise.sh")


def wait_for_a_checkpoint(run: Path) -> None:
    patience = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*")):
        assert time.monotonic() < patience
        time.sleep(0.01)


@contextmanager
def supervised(run: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A run under the supervisor, once it has written a checkpoint."""
    with subprocess.Popen(
        [SUPERVISE, *launch_command(*words, f"output_dir={run}")],
        cwd=ROOT,
        env=launch_environment(run.parent / "cache"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        wait_for_a_checkpoint(run)
        yield process


def test_a_killed_run_is_started_again_and_ends_with_the_same_bytes(
    recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    words = (f"recipe={recipe}", "training.steps=40", "training.save_every=8", "resume=true")
    assert launch(*words, f"output_dir={tmp_path / 'whole'}").returncode == 0
    run = tmp_path / "run"
    with supervised(run, *words) as process:
        (launcher,) = psutil.Process(process.pid).children()
        launcher.kill()  # and its worker is told by the system to end
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "supervise: ended with status 137; starting again" in said
    assert "resuming after step" in said
    assert adapter_bytes(run) == adapter_bytes(tmp_path / "whole")


def test_signal_to_the_supervisor_reaches_the_run(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (f"recipe={recipe}", "training.steps=100000", "training.save_every=5", "resume=true")
    with supervised(run, *words) as process:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "saved after step" in said
    assert "starting again" not in said


def test_a_mistake_is_not_started_for_ever(tmp_path: Path) -> None:
    refused = subprocess.run([SUPERVISE, "false"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "resume=true" in refused.stderr
    gone = subprocess.run(
        [SUPERVISE, "sh", "-c", "exit 3", "resume=true"], capture_output=True, text=True, timeout=60
    )
    assert gone.returncode == 3
    assert gone.stderr.count("starting again") == 4
    assert "five times within a minute" in gone.stderr


@pytest.mark.parametrize(
    ("does", "status", "goes_back"),
    [
        ("touch run/checkpoints/step-00000004.safetensors", 1, True),
        ("echo more >> run/eval/heldout.jsonl", 137, True),
        ("true", 1, False),
        ("echo half > run/checkpoints/.step-00000004.safetensors.9.tmp", 137, False),
        ("touch run/checkpoints/step-00000004.safetensors", 0, False),
    ],
    ids=["saved", "evaluated", "no further", "half saved", "finished"],
)
def test_job_is_requeued_if_it_made_progress(does: str, status: int, goes_back: bool, tmp_path: Path) -> None:
    """srun and scontrol are stand-ins: one leaves what a run would leave, the other notes what it is asked
    for."""
    programs = {
        "srun": f"{does}; exit {status}",
        "scontrol": 'if [ "$1" = show ]; then echo n1; else echo "$@" > asked; fi',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for file in ("checkpoints/step-00000002.safetensors", "eval/heldout.jsonl"):
        (tmp_path / "run" / file).parent.mkdir(parents=True)
        (tmp_path / "run" / file).touch()
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_ID": "7",
    }
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), "recipe=any", "output_dir=run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if goes_back else "")
