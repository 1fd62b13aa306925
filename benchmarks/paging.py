"""The cost of paging: training steps with room for N/8 adapters on the device, against room for all.

256 adapters (128 tasks, fLoRA and LoRA of rank 4, rows of equal size) on a small random-weight Llama, with
rows of real lengths. Trainers alternate the same steps: all resident, paged in memory, paged in files, once
with tasks that take turns (mixture.active_tasks) and once with tasks drawn at random. Prints the ratio of
neighbouring steps (median), the bytes that were moved beside those that Belady's rule moves in an independent
simulation, and whether all adapters ended with the same bits.

Usage: python benchmarks/paging.py [--save]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapted_layer import DEVICE, where

# isort: split
import torch
from contenders.many_tasks import make_trainer
from contenders.workload import SMALL

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.paging import Paging
from flora_train.training.step_plan import plan_step

RESULT = Path(__file__).parent / "results" / f"paging_{DEVICE.type}.md"
TASKS, SLOTS = 128, 32
ADAPTERS = {
    "flora": {"method": "flora", "rank": 4, "lr": 1e-2},
    "lora": {"method": "lora", "rank": 4, "lr": 1e-3},
}
TRAINING = {"tokens_per_step": 2048, "tokens_per_microbatch": 2048, "max_length": 128}
PLANES = 3
"""Weights and AdamW's two moments move; a gradient lives for one step."""
SCHEDULES: dict[str, dict[str, Any]] = {
    "tasks take turns (8 at a time, for 20 steps)": {"strategy": "fair", "active_tasks": 8, "turn_steps": 20},
    "tasks drawn at random": {"strategy": "uniform"},
}
WAYS = ("all resident", "paged, host memory", "paged, files")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="steps of every trainer")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    lines = [
        "# Paging: room for 32 of 256 adapters on the device against room for all",
        "",
        f"{where()}. Random-weight Llama, d = {SMALL['hidden_size']}, {SMALL['num_hidden_layers']} layers, "
        "float32; 128 tasks x (fLoRA, LoRA) of rank 4 on every linear layer; "
        f"{options.steps} steps of 2,048 tokens, AdamW; the trainers' steps alternate. `python "
        "benchmarks/paging.py --save` prints this file.",
        "",
        "| schedule | adapters a step | adapters live | speed against all resident | MB to the device a "
        "step (Belady's rule) | MB back to the host a step | arena cut anew | same bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, mixture in SCHEDULES.items():
        lines += compare(name, mixture, options.steps)
        print("\n".join(lines[-len(WAYS) :]), flush=True)
    lines += ["", NOTE]
    if options.save:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


NOTE = (
    "On a CPU the device's memory is the host's, so that a copy costs what memory takes, and what is shown "
    "is that nothing else is lost; "
    "on a GPU copies go through pinned memory on a stream of their own. Files lie in the system's cache "
    "here as long as it has room."
)


def compare(name: str, mixture: dict[str, Any], steps: int) -> list[str]:
    """Markdown rows, one for each of WAYS."""
    with TemporaryDirectory() as folder:
        paging = (None, Paging(SLOTS), Paging(SLOTS, Path(folder)))
        trainers = [
            make_trainer(
                ADAPTERS, TASKS, mixture, TRAINING | {"steps": steps}, Path(folder) / str(i), DEVICE, way
            )
            for i, way in enumerate(paging)
        ]
        taken: list[list[float]] = [[] for _ in trainers]
        uses: list[set[int]] = []
        for number in range(steps):
            for trainer, seconds in zip(trainers, taken, strict=True):
                plan = plan_step(trainer.mixture, number, trainer.tasks, trainer.bank, 2048)
                assert plan is not None
                started = time.perf_counter()
                trainer.step(number, plan)
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            uses.append(set(plan.label_tokens))
        rows = []
        for way, trainer, seconds in zip(WAYS, trainers, taken, strict=True):
            ratio = statistics.median(a / b for a, b in zip(taken[0], seconds, strict=True))
            same = all(
                torch.equal(trainer.bank.row(i), trainers[0].bank.row(i))
                for i in range(len(trainer.bank.specs))
            )
            adapters = f"{min(map(len, uses))} to {max(map(len, uses))}"
            pager = trainer.bank.pager
            moved = "- | - | -"
            if pager is not None:
                theory = sum(loads(uses, trainer.bank, pool, steps) for pool in trainer.bank.pools)
                into, back = (n / steps / 1e6 for n in (pager.traffic.to_device, pager.traffic.to_host))
                moved = (
                    f"{into:.2f} ({theory / steps / 1e6:.2f}) | {back:.2f} | "
                    f"{pager.traffic.repartitions - PLANES}"
                )
            rows.append(
                f"| {name} | {adapters} | {way} | {ratio:.2f} | {moved} | {'yes' if same else 'NO'} |"
            )
    return rows


def loads(uses: Sequence[set[int]], bank: AdapterBank, pool: Any, steps: int) -> int:
    """Bytes that Belady's rule loads into this pool's rows, where a step's adapters are loaded during the
    previous step."""
    mine = {i for i, (where_, _) in enumerate(bank.location) if where_ is pool}
    needed = [step & mine for step in uses]
    inside: set[int] = set()
    count = 0
    for now, wanted in enumerate(needed):
        computing = needed[now - 1] if now else set()
        for adapter in sorted(wanted - inside):
            if len(inside) == len(pool.values):
                may_leave = inside - wanted - computing or inside - wanted
                later = {
                    a: next((s for s in range(now + 1, steps) if a in needed[s]), steps) for a in may_leave
                }
                inside.remove(max(later, key=lambda a: (later[a], a)))
            inside.add(adapter)
            count += 1
    return count * PLANES * 4 * int(pool.row_size)


if __name__ == "__main__":
    main()
