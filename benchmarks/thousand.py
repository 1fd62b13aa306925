"""The cost of a step with a thousand registered adapters: SmolLM2-135M with 9, 99 and 1,026 of them, the same
batch.

Three processes, each with all its adapters (fLoRA, LoRA of rank 4 on queries and values, IA3) in memory,
alternate the same steps: up to nine adapters of three tasks, rows of 32 to 64 tokens. Prints the time of a
step relative to that with nine, the memory of the adapters beside the estimate of `flora-train plan` (16
bytes per parameter), and the seconds of a checkpoint and of exporting all adapters as PEFT folders.

Usage: python benchmarks/thousand.py [--model assets/models/smollm2-135m] [--steps 15] [--save]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import flora_train.cli  # noqa: F401  (before torch: how its threads wait, as in a run)

# isort: split
import psutil
import torch

from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.runtime.environment import environment
from flora_train.training.step_plan import plan_step

RESULT = Path(__file__).parent / "results" / "thousand_cpu.md"
TASKS = (3, 33, 342)
METHODS: dict[str, Any] = {
    "flora": {"method": "flora", "rank": 4, "lr": 1e-2, "target_modules": ["q_proj", "v_proj"]},
    "lora": {"method": "lora", "rank": 4, "lr": 1e-3, "target_modules": ["q_proj", "v_proj"]},
    "ia3": {"method": "ia3", "lr": 1e-2},
}
BYTES = 16
"""Bytes per parameter: value, gradient and two moments."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="assets/models/smollm2-135m", help="`small` (random weights), or a folder"
    )
    parser.add_argument("--steps", type=int, default=15, help="steps of every process")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    parser.add_argument("--tasks", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tasks is not None:
        serve(options.tasks, options.model, options.steps)
        return
    text = "\n".join(table(options.model, options.steps))
    print(text)
    if options.save:
        RESULT.write_text(text + "\n", encoding="utf-8")


def table(model: str, steps: int) -> list[str]:
    """Markdown."""
    words = [sys.executable, __file__, "--model", model, "--steps", str(steps), "--tasks"]
    processes = [
        subprocess.Popen([*words, str(tasks)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for tasks in TASKS
    ]
    grown = [ask(process) for process in processes]
    taken: list[list[float]] = [[] for _ in processes]
    for number in range(steps):
        for process, seconds in zip(processes, taken, strict=True):
            seconds.append(ask(process, "step")[0])
        print(f"step {number + 1} of {steps}", file=sys.stderr, flush=True)
    rows = []
    for tasks, process, (numbers, memory), seconds in zip(TASKS, processes, grown, taken, strict=True):
        ratio = statistics.median(mine / least for mine, least in zip(seconds, taken[0], strict=True))
        checkpoint, size, export = ask(process, "save")
        planned = numbers * BYTES
        rows.append(
            f"| {3 * tasks:,} | {statistics.median(seconds):.2f} | {ratio:.3f} | {memory / 1e6:,.0f} | "
            f"{planned / 1e6:,.0f} | "
            f"{checkpoint:.1f} ({size / 1e6:,.0f} MB) | {export:.1f} |"
        )
        process.communicate("end\n")
    facts = environment()
    return [
        "# A thousand adapters registered, nine in the batch",
        "",
        f"{facts.machine.processor}, {facts.machine.cpus} CPUs; torch "
        f"{facts.packages['torch']}; {Path(model).name} in float32; {steps} steps that took turns. "
        "`python benchmarks/thousand.py --save` prints this file.",
        "",
        "| adapters | seconds a step | beside nine adapters | memory of adapters (MB) | planned (MB) | "
        "seconds of a checkpoint | seconds to export all |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def ask(process: subprocess.Popen[str], word: str | None = None) -> list[float]:
    """The numbers of an answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    if word is not None:
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
    return [float(number) for number in process.stdout.readline().split()]


def serve(tasks: int, model: str, steps: int) -> None:
    """One process: reports parameters and memory of its adapters, then answers `step` and `save`."""
    from contenders.many_tasks import make_trainer

    resident = psutil.Process().memory_info
    with TemporaryDirectory() as folder:
        training = {
            "steps": steps + 2,
            "tokens_per_step": 640,
            "tokens_per_microbatch": 640,
            "max_length": 64,
        }
        mixture = {"strategy": "fair", "active_tasks": 3, "turn_steps": 10**6}
        build = (METHODS, tasks, mixture, training, Path(folder), torch.device("cpu"))
        _alone = make_trainer(METHODS, 1, {}, training, Path(folder), torch.device("cpu"), model=model)
        before = resident().rss  # with what torch takes once
        trainer = make_trainer(*build, model=model)
        base = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
        for pool in trainer.bank.pools:  # memory is had when it is written to
            pool.gradients.zero_()
            for rows in pool.planes.values():
                rows.add_(0.0)
        numbers = sum(pool.values.numel() for pool in trainer.bank.pools)
        print(numbers, resident().rss - before - base, flush=True)
        number = 0
        for word in sys.stdin:
            if word == "step\n":
                plan = plan_step(
                    trainer.mixture, number, trainer.tasks, trainer.bank, training["tokens_per_microbatch"]
                )
                assert plan is not None
                assert len(plan.label_tokens) <= 9
                started = time.perf_counter()
                trainer.step(number, plan)
                number += 1
                print(time.perf_counter() - started, flush=True)
            elif word == "save\n":
                started = time.perf_counter()
                trainer.save()
                trainer.checkpoints.wait()
                saved = time.perf_counter() - started
                size = trainer.checkpoints.files()[-1].stat().st_size
                started = time.perf_counter()
                for name in trainer.bank.ids:
                    export_peft(trainer.bank, name, Path(folder) / "adapters" / name, base=BaseModel(model))
                print(saved, size, time.perf_counter() - started, flush=True)
            else:
                return


if __name__ == "__main__":
    main()
