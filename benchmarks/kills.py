"""Kills a run with kill -9 at random moments, restarts it, and compares its adapters with those of an
undisturbed run.

A short run on SmolLM2-135M that saves a checkpoint every other step is killed --kills times, all its
processes at once, and restarted by an external supervisor. The moments are spread over start, steps and
evaluations, and every fifth waits for a save. The run then finishes, and its adapters are compared byte by
byte. Prints Markdown.

Usage: python benchmarks/kills.py [--kills 50] [--processes 1] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

import flora_train.cli  # noqa: F401

# isort: split
from flora_train.runtime.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SAVE_EVERY = 2
STEPS = 110
RECIPE = (
    "recipe=quickstart",
    f"training.steps={STEPS}",
    "training.tokens_per_step=192",
    "training.tokens_per_microbatch=192",
    "training.max_length=32",
    "training.log_every=1",
    f"training.save_every={SAVE_EVERY}",
    "evaluation.interval=20",
    "evaluation.max_examples=1",
    "evaluation.problems=[]",
    "tasks.lua.max_validation_examples=2",
    "tasks.perl.max_validation_examples=2",
    "tasks.ruby.max_validation_examples=2",
)


@dataclass
class Seen:
    """Of all kills: seconds from a start to its first step, steps that were done and lost, checkpoints that
    could not be read, and how many kills came while a checkpoint was being written."""

    back: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    damaged: int = 0
    kills: int = 0
    while_saving: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS}/kills_<processes>.md")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        subprocess.run(
            command(whole, options.processes),
            cwd=ROOT,
            env=surroundings(),
            check=True,
            stderr=subprocess.DEVNULL,
        )
        seen = harass(parts, options.kills, options.processes, random.Random(options.seed))
        same = digests(whole) == digests(parts)
        text = "\n".join(report(options.processes, seen, same, len(digests(whole))))
    print(text)
    if options.save:
        (RESULTS / f"kills_{options.processes}.md").write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if same and not seen.damaged and seen.kills == options.kills else 1)


def harass(run: Path, kills: int, processes: int, chance: random.Random) -> Seen:
    """Start, kill and restart the run; let it finish at the end."""
    seen = Seen()
    while True:
        steps_before, started = steps_done(run), time.monotonic()
        with subprocess.Popen(
            command(run, processes), cwd=ROOT, env=surroundings(), stderr=subprocess.PIPE, text=True
        ) as process:
            if seen.kills < kills:
                moment = chance.choice(("start", "save", "step", "step", "step"))
                if moment != "start":
                    wait_for_steps(run, process, 1)
                    first = time.monotonic()
                    seen.back.append(first - started)
                if moment == "save":
                    wait_for_a_save(run, process)
                elif moment == "step":
                    wait_for_steps(run, process, chance.randint(0, 4))
                    time.sleep(chance.uniform(0.0, 2.0))
                else:  # while it starts
                    time.sleep(chance.uniform(0.0, 15.0))
                if process.poll() is None:
                    seen.while_saving += bool(list(run.glob("checkpoints/.step-*.tmp")))
                    kill(process)
                    seen.kills += 1
                    print(
                        f"kill {seen.kills} of {kills}: at step {steps_done(run)}",
                        file=sys.stderr,
                        flush=True,
                    )
            said = process.communicate()[1]
        seen.damaged += said.count("is damaged")
        if found := re.search(r"resuming after step (\d+)", said):
            seen.lost.append(max(0, steps_before - int(found[1])))
        if process.returncode == 0:
            if seen.kills < kills:
                print(f"it ended after {seen.kills} kills: longer runs take more", file=sys.stderr)
            return seen


def wait_for_steps(run: Path, process: subprocess.Popen[str], steps: int) -> None:
    """Wait until this number of further steps is done. Steps that a restart repeats do not count."""
    last, more = steps_done(run), 0
    while process.poll() is None and more < steps:
        done = steps_done(run)
        more, last = more + max(0, done - last), done
        time.sleep(0.02)


def wait_for_a_save(run: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a checkpoint is being written."""
    while process.poll() is None and not list(run.glob("checkpoints/.step-*.tmp")):
        time.sleep(0.001)


def kill(process: subprocess.Popen[str]) -> None:
    """The launcher and its workers, which have sessions of their own."""
    launcher = psutil.Process(process.pid)
    for one in (launcher, *launcher.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            one.kill()


def steps_done(run: Path) -> int:
    """The last complete step in metrics.jsonl."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def command(run: Path, processes: int) -> list[str]:
    config = ROOT / "launch" / ("single.yaml" if processes == 1 else "cpu_2proc.yaml")
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--config_file",
        str(config),
        "train.py",
    ]
    return [*launcher, *RECIPE, f"output_dir={run}", "resume=true"]


def surroundings() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def digests(run: Path) -> dict[str, str]:
    files = sorted((run / "adapters").rglob("*.safetensors"))
    return {str(file.relative_to(run)): sha256(file.read_bytes()).hexdigest() for file in files}


def report(processes: int, seen: Seen, same: bool, adapters: int) -> list[str]:
    """Markdown."""
    facts = environment()
    return [
        f"# {seen.kills} times kill -9, {processes} process{'es' if processes > 1 else ''}",
        "",
        f"{facts.machine.processor}, {facts.machine.cpus} CPUs; torch "
        f"{facts.packages['torch']}; SmolLM2-135M, {adapters} adapters, {STEPS} steps, a checkpoint "
        f"every {SAVE_EVERY}. `python benchmarks/kills.py --kills {seen.kills} --processes {processes} "
        "--save` prints this file.",
        "",
        "| | |",
        "|---|---|",
        f"| kills | {seen.kills}, of which {seen.while_saving} while a checkpoint was being written |",
        (
            "| adapters with the bytes of the run that was not killed | "
            f"{'all' if same else 'NOT all'} of {adapters} |"
        ),
        f"| checkpoints that could not be read | {seen.damaged} |",
        f"| steps done and lost at a kill | at most {max(seen.lost, default=0)}, median "
        f"{statistics.median(seen.lost or [0]):g} |",
        f"| seconds from a start to the first step | median {statistics.median(seen.back or [0]):.1f}, at "
        f"most {max(seen.back, default=0):.1f} |",
    ]


if __name__ == "__main__":
    main()
