"""Runs of the headline recipes as a user starts them, interrupted at a stage, and their figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.forked import ROOT
from tests.hub_server import TOKEN, Hub

CODE_SIZES = (
    "training.steps=30",
    "training.max_length=128",
    "training.tokens_per_step=3456",
    "training.tokens_per_microbatch=3456",
    "mixture.examples_per_draw=1",
    "evaluation.max_examples=4",
    "evaluation.max_problems=2",
    "evaluation.num_samples=2",
    "evaluation.max_new_tokens=48",
    "task_defaults.max_validation_examples=6",
)
"""What of recipe=multipl_e is smaller here; everything else is the recipe's."""

Finish = Callable[[int], "Finished"]
"""Number of processes -> a run that nobody interrupted."""
Reached = Callable[[], bool]
"""Whether a run has reached a stage."""
PATIENCE = 300
"""Seconds that a run may take."""


@dataclass(frozen=True)
class Finished:
    """A finished run, the hub that it used, and what it printed."""

    run: Path
    hub: Hub
    environment: Mapping[str, str]
    stdout: str
    stderr: str

    @property
    def report(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run / "eval" / "report.json").read_text(encoding="utf-8"))
        return content


@contextmanager
def uninterrupted(start: Callable[[int], AbstractContextManager[Finished]]) -> Iterator[Finish]:
    """Runs by their number of processes, each started when it is first needed."""
    known: dict[int, Finished] = {}
    with ExitStack() as stack:

        def run(processes: int) -> Finished:
            if processes not in known:
                known[processes] = stack.enter_context(start(processes))
            return known[processes]

        yield run


def hub_environment(url: str | None, home: Path) -> dict[str, str]:
    """The environment of a user of the hub. home: of all caches; url=None: the hub is out of reach, and only
    the caches are used."""
    ours = {
        "HF_HOME": str(home / "huggingface"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "30",  # a hub on a busy machine is slow to answer
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
    }
    environment = {**os.environ, **ours}
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
        environment.pop(name, None)
    if url is None:
        return {**environment, "HF_HUB_OFFLINE": "1"}
    return {**environment, "HF_ENDPOINT": url, "HF_TOKEN": TOKEN}


def launched(recipe: str, run: Path, *words: str, processes: int = 1) -> list[str]:
    """`accelerate launch train.py recipe=NAME ...`"""
    file = ROOT / "launch" / ("single.yaml" if processes == 1 else "cpu_2proc.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(file)]
    return [*launcher, str(ROOT / "train.py"), f"recipe={recipe}", f"output_dir={run}", *words]


def command(*words: str) -> list[str]:
    """`flora-train WORDS`"""
    return [sys.executable, "-m", "flora_train", *words]


def done(
    words: Sequence[str], environment: Mapping[str, str], timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """A command that has ended."""
    return subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def interrupted(
    words: Sequence[str],
    environment: Mapping[str, str],
    *,
    when: Callable[[], bool],
    number: signal.Signals,
    log: Path,
) -> tuple[int, str]:
    """Start a command and send a signal to all of its processes as soon as `when` is true.

    Returns its exit status and its standard error. The command must not end before.
    """
    with log.open("wb") as errors:
        process = subprocess.Popen(
            words, cwd=ROOT, env=dict(environment), stdout=subprocess.DEVNULL, stderr=errors
        )
    try:
        patience = time.monotonic() + PATIENCE
        while not when():
            text = log.read_text(encoding="utf-8")
            assert process.poll() is None, f"ended before the stage: {text}"
            assert time.monotonic() < patience, text
            time.sleep(0.01)
        everyone = psutil.Process(process.pid)
        for one in (everyone, *everyone.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)
        process.wait(60)
    finally:
        _end(process)
    return process.returncode, log.read_text(encoding="utf-8")


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        everyone = psutil.Process(process.pid)
        for one in (*everyone.children(recursive=True), everyone):
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def lines(pattern: str, folder: Path) -> int:
    """Lines of all files that match."""
    return sum(file.read_bytes().count(b"\n") for file in folder.glob(pattern))


def figures(run: Path) -> dict[str, Any]:
    """Everything of a finished run that is a result: no times, no paths."""
    report = json.loads((run / "eval" / "report.json").read_text(encoding="utf-8"))
    verdicts: dict[str, Any] = {}
    for suite in report["code"]:
        file = run / "eval" / suite["suite"] / "verdicts.jsonl"
        if not file.exists():  # no language runs here
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            verdict = json.loads(line)
            key = "/".join(str(verdict[name]) for name in ("adapter", "language", "name", "sample"))
            verdicts[key] = verdict["status"]
    adapters = {}
    for file in sorted((run / "adapters").glob("*/adapter_model.safetensors")):
        adapters[file.parent.name] = file.read_bytes()
    return {
        "results": report["results"],
        "code": report["code"],
        "speech": report["speech"],
        "adapters": adapters,
        "verdicts": verdicts,
        "curves": report["curves"],
    }
