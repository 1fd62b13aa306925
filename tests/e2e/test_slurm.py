"""launch/slurm.sh on a SLURM cluster of two nodes on this machine, each with its own launcher."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Launch, launch_environment
from tests.e2e.slurm import MISSING, Cluster, cluster
from tests.e2e.test_launch import wait_for_a_checkpoint
from tests.e2e.test_run import adapter_bytes

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install slurmctld slurmd slurm-client munge"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="the nodes' names are mounted, which needs root"),
]
LONG = ("training.steps=100", "training.save_every=5")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    environment = launch_environment(tmp_path_factory.mktemp("cache"))
    with cluster({**environment, "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}) as ours:
        yield ours


@pytest.fixture(scope="module")
def whole(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes without a cluster make of the long run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert launch(f"recipe={recipe}", f"output_dir={run}", *LONG, processes=2).returncode == 0
    return run


def test_two_nodes_train_what_two_processes_train(
    slurm: Cluster, whole: Path, recipe: Path, tmp_path: Path
) -> None:
    said, run = tmp_path / "said.txt", tmp_path / "run"
    job = slurm.submit(said, f"recipe={recipe}", f"output_dir={run}", *LONG)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", said.read_text()
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert json.loads((run / "run.json").read_text())["training"]["processes"] == 2
    assert slurm.fact(job, "Restarts") == "0"


@pytest.mark.parametrize("accident", ["told to end", "a node is lost", "a process is killed"])
def test_job_is_requeued_and_ends_with_the_same_bytes(
    accident: str, slurm: Cluster, whole: Path, recipe: Path, tmp_path: Path
) -> None:
    said, run = tmp_path / "said.txt", tmp_path / "run"
    job = slurm.submit(said, f"recipe={recipe}", f"output_dir={run}", *LONG)
    wait_for_a_checkpoint(run)
    if accident == "told to end":  # as by --signal before its time is up: all tasks of the job's steps
        slurm.ask("scancel", "--signal=TERM", job)
    elif accident == "a node is lost":  # as SLURM says it of one that does not answer
        slurm.ask("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=broken")
    else:
        trainer = next(
            one
            for one in psutil.process_iter(["cmdline"])
            if {"-u", f"output_dir={run}"} <= set(one.info["cmdline"] or ())
        )
        trainer.kill()
    slurm.start_again(job)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", said.read_text()
    assert slurm.fact(job, "Restarts") == "1"
    assert "resuming after step" in said.read_text()
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_a_mistake_ends_the_job(slurm: Cluster, recipe: Path, tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    job = slurm.submit(said, f"recipe={recipe}", f"output_dir={tmp_path / 'run'}", "adapters.lora.rank=0")
    assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED"
    assert slurm.fact(job, "Restarts") == "0"
    assert "adapters.lora.rank = 0" in said.read_text()
