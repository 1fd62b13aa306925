"""GPU time of an adapted layer by kernel: forward and backward of one layer of width 4096 in bfloat16 with
8,192 tokens.

The times are those of torch's profiler; the time that Python takes to launch everything is beside them.
Gradients accumulate over the repetitions, also those of the frozen layer. Prints Markdown.

Usage: python benchmarks/kernel_times.py [--save]
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

from adapted_layer import DEVICE, PURE, RESIDUAL, Problem, where

# isort: split
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flora_train.kernels.flora.triton_op import FusedFlora, ScaledFlora
from flora_train.kernels.lora.batched import SegmentedLora

RESULT = Path(__file__).parent / "results" / "kernel_times_cuda.md"
WIDTH, TOKENS, REPEATS = 4096, 8192, 5
Forward = Callable[[Problem], Tensor]


def flora(offset: float, split: bool) -> Forward:
    return lambda p: FusedFlora.apply(p.x, p.weight, p.A, p.B, p.numbers(offset), p.segments, split)


def scaled(p: Problem) -> Tensor:
    return ScaledFlora.apply(p.x, p.weight, p.A, p.B, p.numbers(PURE), p.segments, False)


def lora(p: Problem) -> Tensor:
    return SegmentedLora.apply(p.frozen(), p.x, p.A, p.B, p.numbers(1.0), p.segments)


LAYERS: list[tuple[str, Forward, int, int]] = [
    ("frozen", Problem.frozen, 1024, 16),
    ("fLoRA, fused", flora(RESIDUAL, False), 1024, 16),
    ("fLoRA, fused", flora(RESIDUAL, False), 256, 16),
    ("fLoRA, split, residual", flora(RESIDUAL, True), 1024, 16),
    ("fLoRA, split, pure", flora(PURE, True), 1024, 16),
    ("LoRA, torch's matmuls", lora, 1024, 16),
    ("LoRA, torch's matmuls", lora, 256, 16),
    ("fLoRA of rank 1, pure, between two scales", scaled, 1024, 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    lines = [
        "# Where an adapted layer's time goes on a GPU",
        "",
        f"{where()}. Width {WIDTH}, {TOKENS} tokens, bfloat16, forward + backward. `python "
        "benchmarks/kernel_times.py --save` prints this file.",
        "",
        (
            "| layer | adapters x tokens each | rank | GPU, ms | times the frozen layer's | Python, "
            "ms | of the GPU's time |"
        ),
        "|---" * 7 + "|",
    ]
    frozen = None
    for name, forward, each, rank in LAYERS:
        on_gpu, in_python, kernels = measure(
            forward, Problem(WIDTH, TOKENS, TOKENS // each, rank, torch.bfloat16)
        )
        frozen = frozen or on_gpu
        largest = ", ".join(f"{kernel} {taken:.3f}" for kernel, taken in kernels[:3])
        lines.append(
            f"| {name} | {TOKENS // each} x {each} | {rank} | {on_gpu:.3f} | {on_gpu / frozen:.2f} | "
            f"{in_python:.2f} | {largest} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text)


def measure(forward: Forward, problem: Problem) -> tuple[float, float, list[tuple[str, float]]]:
    """Milliseconds of the GPU and of Python, and of each kernel, the longest first."""

    def run() -> None:
        forward(problem).backward(problem.dy)

    for _ in range(3):
        run()
    torch.cuda.synchronize(DEVICE)
    started = time.perf_counter()
    for _ in range(2 * REPEATS):
        run()
    in_python = (time.perf_counter() - started) / (2 * REPEATS)
    torch.cuda.synchronize(DEVICE)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize(DEVICE)
    taken: dict[str, float] = {}
    for event in profiler.key_averages():
        name = kernel_name(event.key)
        taken[name] = taken.get(name, 0.0) + event.self_device_time_total / 1e3 / REPEATS
    return sum(taken.values()), 1e3 * in_python, sorted(taken.items(), key=lambda kernel: -kernel[1])


def kernel_name(key: str) -> str:
    """A short name: own kernels by name, the library's matmuls together, elementwise kernels of torch
    together."""
    if key.startswith("_"):
        return key
    return (
        "cuBLAS"
        if key.startswith("nvjet")
        else "sums"
        if "reduce" in key
        else "by element"
        if re.match("void", key)
        else "others"
    )


if __name__ == "__main__":
    main()
