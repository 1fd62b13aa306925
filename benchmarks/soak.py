"""Disturbs the run of a thousand adapters for hours with signals, kills, and short disk and memory, and
compares its result.

    python benchmarks/soak.py --hours 2 --save        benchmarks/results/soak_cpu.md

Needs root, because its disk is a tmpfs that can be filled. Every 20 to 90 seconds a random event happens:
SIGTERM, SIGINT, kill -9, a full disk, or another process that allocates all free memory except one gigabyte
for 20 s. The run is restarted with resume=true whatever ended it. A finished run is compared and begun again;
after the given time, it finishes undisturbed. Its adapters are compared byte by byte with those of an
undisturbed run, which is trained first or given with --reference FOLDER. Resident memory is sampled every 2
s; its growth is that from the first to the last third of the longest session.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil

import flora_train.cli  # noqa: F401

# isort: split
from kills import ROOT, digests, kill, steps_done, surroundings

from flora_train.runtime.environment import environment

RESULT = Path(__file__).parent / "results" / "soak_cpu.md"
EVENTS = ("SIGTERM", "SIGINT", "SIGKILL", "disk full", "memory short")
KEPT_FREE = 10**9
"""Bytes of memory that the allocating process leaves free."""
HELD = 20.0
"""Seconds that disk or memory stay short."""
SAVING = ("training.save_every=3", "training.keep_checkpoints=1")
"""A checkpoint of a thousand adapters has 2 GB, and the disk is small."""


@dataclass
class Seen:
    """hours: how long it was disturbed; events: how often each; ended: exit status -> how often; lost: steps
    done and lost at a start; damaged: checkpoints that could not be read; memory: sitting -> resident bytes
    over time; finished: the adapters' digests of each run that came to its end."""

    hours: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    ended: Counter[int] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    damaged: int = 0
    memory: list[list[int]] = field(default_factory=list)
    finished: list[dict[str, str]] = field(default_factory=list)


def soak(command: list[str], run: Path, disk: Path, seconds: float, chance: random.Random) -> Seen:
    """Start, disturb for the given time, restart, and let it finish."""
    seen, deadline = Seen(hours=seconds / 3600), time.monotonic() + seconds
    while True:
        before, log = steps_done(run), disk.parent / "said.txt"
        with log.open("w", encoding="utf-8") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, env=surroundings(), stdout=subprocess.DEVNULL, stderr=said
            )
        memory: list[int] = []
        seen.memory.append(memory)
        while process.poll() is None:
            moment = time.monotonic() + chance.uniform(20.0, 90.0)
            watch(process, memory, until=moment)
            if process.poll() is None and moment < deadline:
                event = chance.choice(EVENTS)
                seen.events[event] += 1
                print(f"{event} after step {steps_done(run)}", file=sys.stderr, flush=True)
                disturb(event, process, memory, disk)
        words = log.read_text(encoding="utf-8")
        seen.ended[process.returncode] += 1
        seen.damaged += words.count("is damaged")
        if found := re.search(r"resuming after step (\d+)", words):
            seen.lost.append(max(0, before - int(found[1])))
        if process.returncode == 0:
            seen.finished.append(digests(run))
            if time.monotonic() > deadline:
                return seen
            shutil.rmtree(run)
        elif process.returncode not in (-signal.SIGKILL, 2, 75, 137):
            print(words[-2000:], file=sys.stderr, flush=True)


def watch(process: subprocess.Popen[bytes], memory: list[int], until: float) -> None:
    while process.poll() is None and time.monotonic() < until:
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(process.pid)
            family = [launcher, *launcher.children(recursive=True)]
            memory.append(max(one.memory_info().rss for one in family))
        time.sleep(2.0)


def disturb(event: str, process: subprocess.Popen[bytes], memory: list[int], disk: Path) -> None:
    if event == "SIGKILL":
        kill(process)
    elif event.startswith("SIG"):
        for worker in psutil.Process(process.pid).children(recursive=True) or [psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.Signals[event])
    elif event == "disk full":
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
        watch(process, memory, until=time.monotonic() + HELD)
        filler.unlink()
    else:
        taken = max(0, psutil.virtual_memory().available - KEPT_FREE)
        hog = subprocess.Popen(
            [sys.executable, "-c", f"import time; block = b'x' * {taken}; time.sleep({HELD})"]
        )
        watch(process, memory, until=time.monotonic() + HELD)
        hog.kill()
        hog.wait()


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A separate file system. Raises CalledProcessError where it may not be mounted."""
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "disk"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)


def growth(memory: list[int]) -> float:
    """From the median of the first third to that of the last; without the start, when the model is loaded."""
    settled = memory[15:]
    third = len(settled) // 3
    return median(settled[-third:]) / median(settled[:third]) - 1 if third else 0.0


def report(recipe: list[str], seen: Seen, expected: dict[str, str], steps: int) -> str:
    """Markdown."""
    facts = environment()
    same, runs = seen.finished.count(expected), len(seen.finished)
    sittings = [memory for memory in seen.memory if len(memory) > 30]
    longest = max(sittings, key=len)
    peaks = [max(memory) / 1e6 for memory in sittings]
    return "\n".join(
        [
            f"# {seen.hours:g} hours of disturbance: {len(expected)} adapters in one run",
            "",
            f"{facts.machine.processor}, {facts.machine.cpus} CPUs; torch "
            f"{facts.packages['torch']}; "
            f"`{' '.join(recipe)}`, {steps} steps. `python benchmarks/soak.py --hours {seen.hours:g} "
            "--save` prints this file.",
            "",
            "| | |",
            "|---|---|",
            (
                "| what happened | "
                f"{', '.join(f'{count} x {event}' for event, count in sorted(seen.events.items()))} |"
            ),
            (
                "| how sittings ended | "
                f"{', '.join(f'{count} x status {status}' for status, count in sorted(seen.ended.items()))} |"
            ),
            f"| runs that came to their end, all {len(expected)} adapters with the bytes of the run that "
            f"nobody disturbed | {same} of {runs} |",
            f"| checkpoints that could not be read | {seen.damaged} |",
            (
                f"| steps done and lost at a start | at most {max(seen.lost, default=0)}, median "
                f"{median(seen.lost or [0]):g} |"
            ),
            f"| resident memory, the most of each of {len(sittings)} sittings longer than a minute | "
            f"{min(peaks):.0f} to {max(peaks):.0f} MB |",
            f"| its growth within the longest ({len(longest) * 2 / 60:.0f} min) | {growth(longest):+.1%} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", default="6g", help="size of the disk that is filled")
    parser.add_argument(
        "--reference",
        type=Path,
        help="a run of the same recipe that is finished by then, instead of training it first",
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("recipe", nargs="*", default=["recipe=thousand"], help="recipe and settings")
    options = parser.parse_args()
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--config_file",
        "launch/single.yaml",
        "train.py",
    ]
    with TemporaryDirectory() as folder, small_disk(options.disk) as disk:
        whole, parts = options.reference or Path(folder) / "whole", disk / "run"
        if options.reference is None:
            subprocess.run(
                [*launcher, *options.recipe, f"output_dir={whole}"], cwd=ROOT, env=surroundings(), check=True
            )
        command = [*launcher, *options.recipe, *SAVING, f"output_dir={parts}", "resume=true"]
        seen = soak(command, parts, disk, 3600 * options.hours, random.Random(options.seed))
        expected = digests(whole)
        text = report(options.recipe, seen, expected, steps_done(parts))
    print(text)
    if options.save:
        RESULT.write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if seen.finished.count(expected) == len(seen.finished) and not seen.damaged else 1)


if __name__ == "__main__":
    main()
