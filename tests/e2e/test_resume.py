"""A killed or stopped run resumes and ends with the bytes of an uninterrupted one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from flora_train.config.errors import Problem
from flora_train.runtime.signals import SAVED
from tests.e2e.conftest import Launch, launch_command, launch_environment
from tests.e2e.test_run import adapter_bytes, largest_difference
from tests.forked import ROOT, Forked, start

WORDS = ("training.steps=80", "training.save_every=10", "evaluation.interval=40")

Kill = Callable[..., str]


def wait_for_a_checkpoint(folder: Path, step: int, poll: Callable[[], int | None]) -> None:
    """Until there is a new one of `step` or later; not longer than the process runs."""
    patience, before = time.monotonic() + 120, set(folder.glob("checkpoints/step-*"))
    while not any(int(path.stem[5:]) >= step for path in set(folder.glob("checkpoints/step-*")) - before):
        assert poll() is None
        assert time.monotonic() < patience
        time.sleep(0.005)


@pytest.fixture
def kill_after() -> Kill:
    """Start a run and kill it, with all its processes, as soon as it has written a checkpoint of `step` or
    later; returns what it said.

    Two processes are signalled as a cluster does it: also through their launcher."""

    def kill(step: int, folder: Path, *words: str, processes: int = 1, number: int = signal.SIGKILL) -> str:
        environment = launch_environment(folder.parent / "cache")
        if processes == 1 or number != signal.SIGTERM:
            ranks = start(["train.py", *words], environment, processes)
            wait_for_a_checkpoint(folder, step, ranks[0].poll)
            for rank in ranks:
                os.kill(rank.pid, number)
            return "".join(rank.wait(60).stderr for rank in ranks)
        command, pipes = (
            launch_command(*words, processes=processes),
            {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL},
        )
        with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
            wait_for_a_checkpoint(folder, step, process.poll)
            launcher = psutil.Process(process.pid)
            for one in (
                launcher,
                *launcher.children(recursive=True),
            ):  # a launcher's workers are in sessions of their own
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(number)
            return process.communicate(timeout=60)[1]

    return kill


KILLS = {signal.SIGKILL: 20, signal.SIGTERM: 30, signal.SIGINT: 60}
"""A signal and the step of the checkpoint after which a run gets it."""


@pytest.mark.parametrize(
    ("processes", "signals"),
    [
        pytest.param(1, tuple(KILLS), id="one"),
        pytest.param(2, (signal.SIGTERM,), id="two"),
        pytest.param(2, tuple(KILLS), id="two, every signal", marks=pytest.mark.full),
    ],
)
def test_killed_run_resumes_to_the_bytes_of_an_uninterrupted_one(
    launch: Launch,
    kill_after: Kill,
    recipe: Path,
    tmp_path: Path,
    processes: int,
    signals: tuple[signal.Signals, ...],
) -> None:
    words = (f"recipe={recipe}", *WORDS)
    done = launch(*words, f"output_dir={tmp_path / 'whole'}", processes=processes)
    assert done.returncode == 0, done.stderr
    parts = tmp_path / "parts"
    for number in signals:
        told = kill_after(
            KILLS[number],
            parts,
            *words,
            f"output_dir={parts}",
            "resume=true",
            processes=processes,
            number=number,
        )
        if number == signal.SIGKILL:
            continue
        assert f"{signal.Signals(number).name}: finishing and saving the step" in told
        saved = re.search(r"stopped by a signal: saved after step (\d+); resume=true", told)
        assert saved, told
        assert (parts / "checkpoints" / f"step-{int(saved[1]):08d}.safetensors").exists()
    last = launch(*words, f"output_dir={parts}", "resume=true", processes=processes)
    assert last.returncode == 0, last.stderr
    assert "resuming after step" in last.stderr
    assert adapter_bytes(parts) == adapter_bytes(tmp_path / "whole")
    assert not list(parts.rglob("step-*"))


def test_run_resumes_with_another_number_of_processes(
    launch: Launch, kill_after: Kill, recipe: Path, tmp_path: Path
) -> None:
    words, parts = (f"recipe={recipe}", *WORDS), tmp_path / "parts"
    assert launch(*words, f"output_dir={tmp_path / 'whole'}").returncode == 0
    for step, processes in ((10, 2), (30, 1)):
        kill_after(step, parts, *words, f"output_dir={parts}", "resume=true", processes=processes)
    last = launch(*words, f"output_dir={parts}", "resume=true", processes=2)
    assert last.returncode == 0, last.stderr
    assert int(re.search(r"resuming after step (\d+)", last.stderr)[1]) >= 30  # type: ignore[index]
    assert largest_difference(parts, tmp_path / "whole") <= 1e-5


def test_unfinished_run_of_another_configuration_is_refused_before_the_model_loads(
    launch: Launch, kill_after: Kill, recipe: Path, tmp_path: Path
) -> None:
    words = (f"recipe={recipe}", *WORDS, f"output_dir={tmp_path / 'run'}", "resume=true")
    kill_after(10, tmp_path / "run", *words)
    other = tmp_path / "other"
    other.mkdir()
    refused = launch(*words, "adapters.lora.rank=3", f"model.path={other}")
    assert refused.returncode in (1, 2)
    told = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert [line.split(": was")[0] for line in told] == [
        f"error: {Problem('model.path', str(other), 'was')}".removesuffix(": was"),
        "error: adapters.lora.rank = 3",
    ]


def test_stopped_run_ends_with_its_exit_status(recipe: Path, tmp_path: Path) -> None:
    words = (
        f"recipe={recipe}",
        "training.steps=100000",
        "training.save_every=5",
        f"output_dir={tmp_path / 'run'}",
    )
    run = Forked(["train.py", *words], launch_environment(tmp_path / "cache"))
    wait_for_a_checkpoint(tmp_path / "run", 5, run.poll)
    os.kill(run.pid, signal.SIGTERM)
    done = run.wait(60)
    assert done.returncode == SAVED == 75
    assert "Traceback" not in done.stderr
