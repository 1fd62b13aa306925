"""Measures at which sizes one formulation of fLoRA becomes faster than another, and writes the cost model's
thresholds.

Every formulation is timed, forward and backward, interleaved with the others, on shapes around the crossover
points. The thresholds are those with the smallest average loss against the fastest formulation of each shape.
Prints Markdown; `--save` writes it to benchmarks/results, and the thresholds of this device to
flora_train/kernels/flora/thresholds.json. `--refit` measures nothing and uses the ratios of a committed file.

Usage: python benchmarks/calibrate.py [--repeats 5] [--refit benchmarks/results/calibration_cuda.md] [--save]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from adapted_layer import DEVICE, RESIDUAL, Problem, seconds, where

# isort: split
import torch

from flora_train.kernels.backend import why_not_triton
from flora_train.kernels.flora import cost_model
from flora_train.kernels.flora.cost_model import Formulation, Thresholds, Work, decide, device_name
from flora_train.kernels.flora.op import formulation

RESULTS = Path(__file__).parent / "results"
THRESHOLDS = Path(cost_model.__file__).with_name("thresholds.json")
MOST_TOKENS = 16384 if DEVICE.type == "cuda" else 2048
DTYPES = {4: torch.float32, 2: torch.bfloat16}
WIDTHS = (
    {4: (1024,), 2: (1024, 4096)} if DEVICE.type == "cuda" else dict.fromkeys(DTYPES, (128, 256, 576, 1024))
)
EACH = (1, 8, 16, 32, 64, 128, 256)
LONG = (1024, 4096, 8192, 16384) if DEVICE.type == "cuda" else ()
ADAPTERS = (1, 4, 16, 64)
RANKS = (1, 2, 4, 16)
EXPANDING = (100, 105, 110, 120, 130, 140, 160, 200)
FORMING = (0, 10, 20, 30, 40, 50, 60, 80, 100, 120, 150, 200, 300, 500, 1000)
FORMING_A_RANK = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
FUSED_TOKENS = (0, 1024, 4096, 8192, 1 << 20)
GROUPED_MIB = (0, 1, 2, 4, 8, 12, 16, 24, 32, 64)
MOST_SECONDS = 1.0


@dataclass(frozen=True)
class Timed:
    """A shape, and the seconds of every formulation on it."""

    work: Work
    seconds: dict[str, float]

    def loss(self, thresholds: Thresholds) -> float:
        """Time of the chosen formulation relative to the fastest one."""
        return self.seconds[decide(self.work, thresholds).formulation] / min(self.seconds.values())

    def by(self, triton: bool) -> Timed:
        """The work for torch alone, or with the Triton kernels."""
        ours = {name: taken for name, taken in self.seconds.items() if triton or name != "fused"}
        return Timed(replace(self.work, triton=triton), ours)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds over the formulations of a shape")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS} and {THRESHOLDS}")
    parser.add_argument("--refit", type=Path, help="a file that this script wrote: only its thresholds anew")
    options = parser.parse_args()
    for timed, machine in [read(options.refit)] if options.refit else measured(options.repeats):
        sizes = sorted({t.work.bytes_each for t in timed})
        found = {size: fit([t for t in timed if t.work.bytes_each == size]) for size in sizes}
        text = "\n".join(report(timed, found, options.repeats, machine)) + "\n"
        print(text)
        if options.save:
            name = device_name(timed[0].work)
            (RESULTS / f"calibration_{name.replace(', ', '_')}.md").write_text(text)
            save(name, found, machine)


def measured(repeats: int) -> Iterator[tuple[list[Timed], str]]:
    """The timings of every shape for torch and, where they run, for the Triton kernels; and the machine."""
    ways = [False, *([True] if DEVICE.type == "cuda" and why_not_triton(DEVICE) is None else [])]
    shapes = list(works())
    began, timed = time.monotonic(), []
    for i, work in enumerate(shapes):
        timed.append(measure(work, repeats, with_triton=ways[-1]))
        left = (time.monotonic() - began) / (i + 1) * (len(shapes) - i - 1)
        print(f"\r{i + 1}/{len(shapes)} shapes, {left:.0f} s left", end="", flush=True)
    print("\r" + " " * 40)
    for triton in ways:
        yield [t.by(triton) for t in timed], where()


def read(file: Path) -> tuple[list[Timed], str]:
    """The shapes of a saved report, with ratios in place of seconds, and the machine."""
    lines = file.read_text().splitlines()
    device = "cuda" if "cuda" in file.stem else "cpu"
    heading = next(line.split(" | ") for line in lines if line.startswith("| dtype | shape"))
    names, found = [name.replace(" ", "_") for name in heading[5:-1]], []
    for line in lines:
        if shape := re.match(r"\| torch\.(\w+) \| d (\d+), (\d+) x (\d+) tokens, r (\d+) \|", line):
            size, (d, adapters, each, rank) = getattr(torch, shape[1]).itemsize, map(int, shape.groups()[1:])
            work = Work(
                rank, True, adapters * each, adapters, d, d, bytes_each=size, split=size == 2, device=device
            )
            ratios = map(float, line.split(" | ")[5:-1])
            found.append(
                Timed(replace(work, triton="triton" in file.stem), dict(zip(names, ratios, strict=True)))
            )
    return found, next(
        line.split(". `python")[0] for line in lines if "`python benchmarks/calibrate.py" in line
    )


def works() -> list[Work]:
    """Shapes around the crossover points. Residual adapters: pure ones of one more rank have the same number
    of terms."""
    found = []
    for size in DTYPES:
        for width in WIDTHS[size]:
            for adapters in ADAPTERS:
                for each in EACH + LONG:
                    for rank in RANKS:
                        work = Work(
                            rank,
                            True,
                            each * adapters,
                            adapters,
                            width,
                            width,
                            bytes_each=size,
                            split=size == 2,
                        )
                        turning = each in LONG or 8 <= work.terms * each <= 2048
                        if each * adapters <= MOST_TOKENS and turning and each * adapters >= 16:
                            found.append(replace(work, device=DEVICE.type))
    return found


def measure(work: Work, repeats: int, with_triton: bool) -> Timed:
    """The median seconds of every formulation that supports this work."""
    problem = Problem(work.in_features, work.tokens, work.segments, work.rank, DTYPES[work.bytes_each])
    names: list[Formulation] = [
        "rank_expanded",
        *(["materialised"] if work.device == "cpu" else []),
        "grouped",
    ]
    names += ["fused"] if with_triton else []

    def once(name: Formulation) -> None:
        offset = problem.numbers(RESIDUAL)
        arguments = (problem.x, problem.weight, problem.A, problem.B, offset, problem.segments, work.split)
        formulation(name).apply(*arguments).backward(problem.dy)

    taken: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        once(name)
    ends = time.perf_counter() + MOST_SECONDS
    for i in range(repeats):
        if i and time.perf_counter() > ends:
            break
        for name, of_name in taken.items():
            of_name.append(seconds(lambda name=name: once(name)))
    return Timed(work, {name: statistics.median(of_name) for name, of_name in taken.items()})


def fit(timed: Sequence[Timed]) -> Thresholds:
    """The thresholds with the smallest mean logarithm of the loss."""
    grouped = GROUPED_MIB if DEVICE.type == "cpu" else (0,)
    fused = FUSED_TOKENS if timed[0].work.triton else FUSED_TOKENS[-1:]
    candidates = product(product(EXPANDING, FORMING, FORMING_A_RANK), grouped, fused)
    return min(
        (Thresholds(*costs, mib << 20, n) for costs, mib, n in candidates), key=lambda t: mean_loss(timed, t)
    )


def mean_loss(timed: Sequence[Timed], thresholds: Thresholds) -> float:
    return math.exp(statistics.fmean(math.log(t.loss(thresholds)) for t in timed))


def report(timed: Sequence[Timed], found: dict[int, Thresholds], repeats: int, machine: str) -> list[str]:
    """Markdown."""
    lines = [
        "# Where fLoRA's formulations overtake each other",
        "",
        f"{machine}. `python benchmarks/calibrate.py --save` prints this file.",
        f"Forward + backward of {len(timed)} shapes, residual adapters, median of up to {repeats} "
        "interleaved rounds. The loss of a",
        (
            "rule is how many times slower its choice is than the fastest formulation of a shape (geometric "
            "mean)."
        ),
        "",
        "| dtype | a term costs (% of a run through W0) | forming W0 * M costs an adapter (tokens through "
        "W0) | and a rank | work on all adapters at once up to (MiB of W0 * M) | our own kernel up to "
        "(tokens per adapter) | loss | worst shape | loss of always the same |",
        "|---" * 9 + "|",
    ]
    for size, thresholds in found.items():
        mine = [t for t in timed if t.work.bytes_each == size]
        worst = max(mine, key=lambda t: t.loss(thresholds))
        always = {
            name: math.exp(
                statistics.fmean(math.log(t.seconds[name] / min(t.seconds.values())) for t in mine)
            )
            for name in mine[0].seconds
        }
        alternatives = ", ".join(f"{name.replace('_', ' ')} {loss:.2f}" for name, loss in always.items())
        lines.append(
            f"| {DTYPES[size]} | {thresholds.expanding} | {thresholds.forming} | "
            f"{thresholds.forming_a_rank} | {thresholds.grouped_bytes >> 20} | {thresholds.fused_tokens} | "
            f"{mean_loss(mine, thresholds):.3f} | "
            f"{worst.loss(thresholds):.2f} at {said(worst.work)} | {alternatives} |"
        )
    lines += [
        "",
        "| dtype | shape | terms x tokens each | MiB of W0 * M | fastest | "
        + " | ".join(name.replace("_", " ") for name in timed[0].seconds)
        + " | chosen |",
        "|---" * (len(timed[0].seconds) + 6) + "|",
    ]
    for t in timed:
        fastest = min(t.seconds, key=lambda name: t.seconds[name])
        ratios = " | ".join(f"{seconds / t.seconds[fastest]:.2f}" for seconds in t.seconds.values())
        work = t.work
        mib = work.segments * work.in_features * work.out_features * work.bytes_each / 2**20
        chosen = decide(work, found[work.bytes_each]).formulation
        lines.append(
            f"| {DTYPES[work.bytes_each]} | {said(work)} | {work.terms * work.tokens // work.segments} | "
            f"{mib:.1f} | "
            f"{fastest.replace('_', ' ')} | {ratios} | {chosen.replace('_', ' ')} |"
        )
    return lines


def said(work: Work) -> str:
    return f"d {work.in_features}, {work.segments} x {work.tokens // work.segments} tokens, r {work.rank}"


def save(name: str, found: dict[int, Thresholds], machine: str) -> None:
    """Replace the entries of this device and backend; values that were not measured are those of the CPU."""
    known = json.loads(THRESHOLDS.read_text())
    known["measured_on"][name] = machine
    known["thresholds"][name] = {str(size): asdict(t) for size, t in sorted(found.items())}
    for other, measured in known["measured_on"].items():
        if measured is None:
            cpu = known["thresholds"]["cpu"]
            known["thresholds"][other] = {
                size: numbers | {"grouped_bytes": 0} for size, numbers in cpu.items()
            }
    THRESHOLDS.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
