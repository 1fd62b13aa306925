"""Twelve adapters on speech: one joint run beside twelve PEFT runs one after the other, on the same clips.

    make speech-local
    python benchmarks/speech_joint.py --save        benchmarks/results/speech_joint_cpu.md

Four languages x fLoRA (PEFT: HiRA, its residual form), LoRA and IA3 on Whisper base, in encoder and decoder
as in recipe speech_local, and in the decoder only. One segment is a step of the joint run (every adapter
learns from its task's clips of that step), then one step of each PEFT run on the same clips in batches of the
same windows; segments alternate. With adapters in the decoder only, PEFT encodes a clip in every run, the
joint run once. Memory is the largest resident size of a process that does one step: with all adapters for
flora_train, with one for PEFT.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import flora_train.cli  # noqa: F401  (how torch's threads wait is read when torch loads)

# isort: split
import torch
from contenders.peft_run import Batch, PeftRun, batches_of

from flora_train.adapters.spec import expand
from flora_train.config.load import load_config
from flora_train.config.schema import RunConfig
from flora_train.run_context import RunContext, load_context
from flora_train.runtime.environment import available_cpus, environment
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.step_plan import StepPlan, plan_step
from flora_train.training.trainer import Trainer

PLACES = {"encoder and decoder": "null", "decoder only": "decoder"}
"""Where the adapters are -> adapters.NAME.parent_module."""
RESULT = Path(__file__).resolve().parent / "results" / "speech_joint_cpu.md"


def configuration(place: str) -> RunConfig:
    """recipe speech_local on fewer clips, which are read sooner."""
    limits = [f"tasks.{task}.max_examples=200" for task in ("cs", "nl", "ro", "bg")]
    within = [f"adapters.{method}.parent_module={PLACES[place]}" for method in ("flora", "lora", "ia3")]
    return load_config(
        ["recipe=speech_local", "model.dtype=float32", "training.log_every=1", *limits, *within]
    )


class Joint:
    """flora_train's trainer, step by step."""

    def __init__(self, folder: Path, place: str) -> None:
        config = configuration(place)
        self.session: RunContext = load_context(config, RunFolder(folder), torch.device("cpu"))
        self.trainer = Trainer(self.session)
        self.session.model.train()

    def plan(self, number: int) -> StepPlan:
        """The step's rows; their features are computed before, and not measured."""
        trainer = self.trainer
        plan = plan_step(
            trainer.mixture,
            number,
            trainer.tasks,
            trainer.bank,
            trainer.config.training.tokens_per_microbatch,
        )
        assert plan is not None
        for rows in plan.microbatches:
            trainer.make_batch(rows)
        return plan

    def step(self, number: int, plan: StepPlan) -> None:
        self.trainer.step(number, plan)

    def batches_of(self, plan: StepPlan, adapter: int) -> list[Batch]:
        """One adapter's part of a step, for PEFT."""
        return batches_of(
            plan, adapter, self.trainer.training_split, self.session.collate, self.session.pad_token
        )


def times(repeats: int, place: str) -> dict[str, Any]:
    """Seconds of every segment, and the parts of flora_train's."""
    torch.set_num_threads(available_cpus())
    with tempfile.TemporaryDirectory() as folder:
        joint = Joint(Path(folder), place)
        specs = joint.session.bank.specs
        runs = [PeftRun(joint.session.config, spec) for spec in specs]
        found: dict[str, list[float]] = {"joint": [], "peft": []}
        for number in range(repeats + 1):
            plan = joint.plan(number)
            if not number:
                joint.trainer.time_base(plan)
            parts = [joint.batches_of(plan, adapter) for adapter in range(len(specs))]
            order = ["joint", "peft"] if number % 2 else ["peft", "joint"]
            for who in order:
                started = time.perf_counter()
                if who == "joint":
                    joint.step(number, plan)
                else:
                    for run, batches in zip(runs, parts, strict=True):
                        run.step(batches)
                if number:  # the first is a warm-up
                    found[who].append(time.perf_counter() - started)
        return {**found, "adapters": len(specs), "shares": joint.trainer.timer.shares()}


def peaks(place: str) -> dict[str, float]:
    """GiB of a separate process that does one step: jointly, and with every method in PEFT."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        joint = Joint(Path(folder), place)
        plan = joint.plan(0)
        for who in ("joint", *dict.fromkeys(spec.family for spec in joint.session.bank.specs)):
            file = Path(folder) / f"{who}.pt"
            if who != "joint":
                torch.save(joint.batches_of(plan, joint.session.bank.ids[f"cs-{who}"]), file)
            done = subprocess.run(
                [sys.executable, __file__, "--peak", who, str(file), place],
                capture_output=True,
                text=True,
                check=True,
            )
            found[who] = float(done.stdout.splitlines()[-1])
    return found


def one_step(who: str, file: str, place: str) -> None:
    """Do one step, and print the largest resident size."""
    torch.set_num_threads(available_cpus())
    if who == "joint":
        with tempfile.TemporaryDirectory() as folder:
            joint = Joint(Path(folder), place)
            joint.step(0, joint.plan(0))
    else:
        config = configuration(place)
        spec = next(spec for spec in expand(config) if spec.name == f"cs-{who}")
        PeftRun(config, spec).step(torch.load(file))
    # not getrusage: its figure begins with that of the process that started this one
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20)


def report(repeats: int) -> str:
    """The result, as Markdown."""
    facts = environment()
    where = f"{facts.machine.processor}, {available_cpus()} threads, float32"
    versions = ", ".join(f"{name} {facts.packages[name]}" for name in ("torch", "transformers", "peft"))
    parts = [part for place in PLACES for part in section(repeats, place)]
    return "\n".join(
        [
            "# Speech: twelve adapters in one run, and in twelve PEFT runs one after the other",
            "",
            f"{where}, {versions}, commit {facts.commit}. `python benchmarks/speech_joint.py --repeats "
            f"{repeats} --save` prints this file.",
            "",
            *parts,
        ]
    )


def section(repeats: int, place: str) -> list[str]:
    """One place of the adapters."""
    found, memory = times(repeats, place), peaks(place)
    ratios = [theirs / ours for theirs, ours in zip(found["peft"], found["joint"], strict=True)]
    alone = max(size for who, size in memory.items() if who != "joint")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found["shares"].items() if share >= 0.005)
    return [
        f"## Adapters in {place}",
        "",
        "| | joint | PEFT | PEFT / joint |",
        "|---|---|---|---|",
        f"| one step of {found['adapters']} adapters, median of {repeats} that took turns | "
        f"{median(found['joint']):.1f} s "
        f"| {median(found['peft']):.1f} s | **{median(ratios):.2f}** [{min(ratios):.2f}, {max(ratios):.2f}] "
        "|",
        (
            f"| memory of one process, GiB | {memory['joint']:.2f} | {alone:.2f} (one adapter) | "
            f"{alone / memory['joint']:.2f} |"
        ),
        "",
        f"Where the joint run's time goes: {shares}.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        one_step(*options.peak)
        return
    text = report(options.repeats)
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
