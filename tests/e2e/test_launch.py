"""The scripts of launch/: a run that is started again until it has ended, and one on two machines (two launchers on this one)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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


def test_a_killed_run_is_started_again_and_ends_with_the_same_bytes(recipe: Path, launch: Launch, tmp_path: Path) -> None:
    words = (f"recipe={recipe}", "training.steps=60", "training.checkpoint_every=10", "resume=true")
    assert launch(*words, f"output_dir={tmp_path / 'whole'}").returncode == 0
    run = tmp_path / "run"
    with supervised(run, *words) as process:
        (launcher,) = psutil.Process(process.pid).children()
        launcher.kill()  # and its worker is told by the system to end
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "supervise: ended with status 137; starting again" in said
    assert "going on after step" in said
    assert adapter_bytes(run) == adapter_bytes(tmp_path / "whole")


def test_who_tells_the_supervisor_to_end_tells_the_run(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (f"recipe={recipe}", "training.steps=100000", "training.checkpoint_every=5", "resume=true")
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
    gone = subprocess.run([SUPERVISE, "sh", "-c", "exit 3", "resume=true"], capture_output=True, text=True, timeout=60)
    assert gone.returncode == 3
    assert gone.stderr.count("starting again") == 4
    assert "five times within a minute" in gone.stderr


SRUN = """#!/usr/bin/env bash
# SLURM's srun as far as it matters here: the command once a node, each with its SLURM_NODEID; fails if one of them does.
while [ "${1#--}" != "$1" ]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & pids="$pids $!"; done
status=0
for pid in $pids; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in show) echo 127.0.0.1; echo 127.0.0.1 ;; requeue) echo "$2" >> "$REQUEUED" ;; esac
"""


@pytest.mark.slow
def test_two_nodes_of_a_cluster_train_what_two_processes_train(recipe: Path, launch: Launch, tmp_path: Path) -> None:
    """launch/slurm.sh with stand-ins of srun and scontrol; the launchers, their meeting and the exchange are real."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = launch_environment(tmp_path / "cache")
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    cluster = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "here[1-2]", "SLURM_JOB_ID": "4711"}
    environment |= {"PATH": path, "REQUEUED": str(tmp_path / "requeued"), **cluster}

    def job(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "launch/slurm.sh", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    assert launch(f"recipe={recipe}", f"output_dir={tmp_path / 'here'}", processes=2).returncode == 0
    done = job(f"recipe={recipe}", f"output_dir={tmp_path / 'nodes'}")
    assert done.returncode == 0, done.stderr
    assert adapter_bytes(tmp_path / "nodes") == adapter_bytes(tmp_path / "here")
    assert json.loads((tmp_path / "nodes" / "run.json").read_text())["training"]["processes"] == 2
    assert not (tmp_path / "requeued").exists()
    long = (f"recipe={recipe}", f"output_dir={tmp_path / 'long'}", "training.checkpoint_every=5")
    with subprocess.Popen(["bash", "launch/slurm.sh", *long, "training.steps=400"], cwd=ROOT, env=environment) as told:
        wait_for_a_checkpoint(tmp_path / "long")
        for one in psutil.Process(told.pid).children(recursive=True):  # as SLURM does to the tasks of a job's steps
            if "python" in one.cmdline()[0]:
                one.terminate()
        told.wait(timeout=60)
    assert told.returncode != 0
    assert (tmp_path / "requeued").read_text() == "4711\n"
    (tmp_path / "requeued").unlink()
    wrong = job(*long, "training.steps=400", "adapters.lora.rank=0")
    assert wrong.returncode != 0
    assert "adapters.lora.rank = 0" in wrong.stderr
    assert not (tmp_path / "requeued").exists()
