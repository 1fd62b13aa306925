"""Profiles of the benchmarks: torch's profiler over the steps of joint.py and the layers of layer.py.

Every operator's own time is assigned to a purpose; time outside operators (Python, autograd, waiting) is the
rest of the step. The layers run on one thread, because the profiler does not record the workers of
kernels/cpu_threads.py. The profiler itself slows small operators.

Usage: python benchmarks/profiles.py [--save]
"""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import flora_train.cli  # noqa: F401  (before torch: how its threads wait, as in a run)

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import layer
from benchmarks.contenders import workload
from flora_train.runtime.environment import environment

CONTENDERS = Path(__file__).parent / "contenders"
RESULT = Path(__file__).parent / "results" / "profiles_cpu.md"
STEPS = {"frozen": ("frozen", "none"), **{name: ("ours", name) for name in ("lora", "flora", "mixed")}}
REGIME = ("small", 16, 64, 32)  # model, adapters, rows, tokens
SHAPE = (1024, 2048, 16)
LAYERS = ("fLoRA r=4", "fLoRA r=16", "LoRA r=16", "IA3")

MATMULS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::baddbmm_"}
RANK_AT_MOST = 16
KINDS = {
    "attention": ("attention",),
    "copies": ("copy", "cat", "fill", "zero", "index", "gather", "scatter", "embedding"),
}
COLUMNS = (
    "matmuls over tokens",
    "matmuls of a rank",
    "element by element",
    "attention",
    "copies",
    "Python and waiting",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    facts = environment()
    machine, torch_version = facts.machine, facts.packages["torch"]
    model, adapters, rows, length = REGIME
    lines = [
        "# Where the time goes",
        "",
        f"{machine.processor}, {machine.threads} threads, float32, torch {torch_version}, commit "
        f"{facts.commit}.",
        "Milliseconds a step, and their share of it. `python benchmarks/profiles.py --save` prints this "
        "file.",
        "",
        f"## joint.py: {model} model, {adapters} adapters, {rows} rows x {length} tokens",
        "",
        *table({name: step_of(*which) for name, which in STEPS.items()}),
        "## layer.py: d = {}, {} tokens, {} adapters, forward and backward on one thread".format(*SHAPE),
        "",
    ]
    torch.set_num_threads(1)
    columns = layer.as_run()
    problems = {name: layer.Problem(*SHAPE, columns[name][0], torch.float32) for name in LAYERS}
    steps = {name: layer_step(problems[name], columns[name][1]) for name in LAYERS}
    lines += table({"frozen": layer_step(problems["IA3"], layer.Problem.frozen), **steps})
    text = "\n".join(lines)
    print(text)
    if options.save:
        RESULT.write_text(text)


def step_of(program: str, method: str) -> Callable[[], None]:
    """The step of a contender."""
    served: list[Callable[[], None]] = []
    serve, arguments = workload.serve, sys.argv
    model, adapters, rows, length = REGIME
    workload.serve = served.append  # type: ignore[assignment]
    sys.argv = [program, model, method, *map(str, (adapters, rows, length, torch.get_num_threads()))]
    try:
        runpy.run_path(str(CONTENDERS / f"{program}.py"))
    finally:
        workload.serve, sys.argv = serve, arguments
    return served[0]


def layer_step(problem: layer.Problem, forward: layer.Forward) -> Callable[[], None]:
    return lambda: forward(problem).backward(problem.dy)


def table(steps: dict[str, Callable[[], None]]) -> list[str]:
    """Markdown: a row a step, a column a kind."""
    lines = [f"| | step | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, step in steps.items():
        seconds, kinds = measure(step)
        cells = [f"{kinds[kind] * 1e3:.1f} ({kinds[kind] / seconds:.0%})" for kind in COLUMNS]
        lines.append(f"| {name} | {seconds * 1e3:.1f} | {' | '.join(cells)} |")
    return [*lines, ""]


def measure(step: Callable[[], None], repeats: int = 10) -> tuple[float, Counter[str]]:
    """(seconds of a step, seconds by kind): means."""
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        started = time.perf_counter()
        for _ in range(repeats):
            step()
        seconds = (time.perf_counter() - started) / repeats
    kinds: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        kinds[kind_of(event.key, event.input_shapes)] += event.self_cpu_time_total / 1e6 / repeats
    kinds[COLUMNS[-1]] += seconds - sum(kinds.values())
    return seconds, kinds


def kind_of(name: str, shapes: list[list[int]]) -> str:
    if name in MATMULS:
        sizes = [size for shape in shapes if len(shape) > 1 for size in shape[-2:]]
        return COLUMNS[1] if min(sizes, default=0) <= RANK_AT_MOST else COLUMNS[0]
    if not name.startswith("aten::"):
        return COLUMNS[-1]
    return next(
        (kind for kind, words in KINDS.items() if any(word in name for word in words)), "element by element"
    )


if __name__ == "__main__":
    main()
