"""The run of a thousand adapters from its first step to its report: its duration and its memory over time.

Resident memory of the process is sampled every 2 s, with the current step of metrics.jsonl. Prints Markdown.

Usage: python benchmarks/thousand_run.py [--save] [recipe=thousand key=value ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil

import flora_train.cli  # noqa: F401

# isort: split
from kills import ROOT, digests, steps_done, surroundings

from flora_train.runtime.environment import environment

RESULT = Path(__file__).parent / "results" / "thousand_run_cpu.md"
PARTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    parser.add_argument("recipe", nargs="*", default=["recipe=thousand"], help="recipe and settings")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "train.py", *options.recipe, "training.log_every=1", f"output_dir={run}"]
        started = time.monotonic()
        with subprocess.Popen(command, cwd=ROOT, env=surroundings()) as process:
            samples = watch(process, run)
        minutes = (time.monotonic() - started) / 60
        if process.returncode:
            sys.exit(process.returncode)
        text = "\n".join(report(options.recipe, samples, minutes, len(digests(run))))
    print(text)
    if options.save:
        RESULT.write_text(text + "\n", encoding="utf-8")


def watch(process: subprocess.Popen[bytes], run: Path) -> list[tuple[int, int]]:
    """(steps done, resident bytes) over time."""
    samples = []
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            samples.append((steps_done(run), psutil.Process(process.pid).memory_info().rss))
        time.sleep(2.0)
    return samples


def report(recipe: list[str], samples: list[tuple[int, int]], minutes: float, adapters: int) -> list[str]:
    """Markdown. After the last step come evaluation, export and the report."""
    facts, steps = environment(), max(step for step, _ in samples)
    training = [(step, memory) for step, memory in samples if 0 < step < steps]
    lines = [
        f"# {adapters} adapters in one run, to the end",
        "",
        f"{facts.machine.processor}, {facts.machine.cpus} CPUs; torch "
        f"{facts.packages['torch']}; `{' '.join(recipe)}`, {steps} steps, "
        f"{minutes:.0f} minutes. `python benchmarks/thousand_run.py --save` prints this file.",
        "",
        "| | resident memory, median (MB) |",
        "|---|---|",
    ]
    for part in range(PARTS):
        first, last = (1 + round(steps * n / PARTS) for n in (part, part + 1))
        within = [memory for step, memory in training if first <= step < last]
        lines.append(f"| steps {first} to {last - 1} | {median(within) / 1e6:.0f} |")
    after = [memory for step, memory in samples if step == steps]
    return [*lines, f"| after the last step, at most | {max(after) / 1e6:.0f} |"]


if __name__ == "__main__":
    main()
