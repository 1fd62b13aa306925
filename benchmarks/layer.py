"""The cost of an adapted layer: forward and backward against the same frozen layer, on this machine.

Runs of the adapted and the frozen layer alternate; each figure is the median of the pairs' ratios. The first
table of a dtype shows what a run uses (the cost model chooses the formulation), the second forces each
formulation. Prints Markdown, and writes it with `--save`.

Usage: python benchmarks/layer.py [--quick] [--repeats 7] [--dtype float32] [--save]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from adapted_layer import PURE, RESIDUAL, Problem, where

# isort: split
import torch
from torch import Tensor

from flora_train.kernels.backend import splits
from flora_train.kernels.flora.op import TORCH_FORMULATIONS, flora_linear
from flora_train.kernels.ia3.op import ia3_scale
from flora_train.kernels.lora.op import lora_add
from flora_train.runtime.environment import environment

RESULT = Path(__file__).parent / "results" / "layer_cpu.md"
Shape = tuple[int, int, int]  # d, tokens, adapters
SHAPES: list[Shape] = [
    (256, 2048, 16),
    *((576, 1024, 1024 // each) for each in (8, 32, 128, 512, 1024)),
    *((1024, 2048, 2048 // each) for each in (8, 32, 128, 256, 512, 1024)),
]
FORCED: list[Shape] = [
    (256, 2048, 16),
    (576, 1024, 32),
    (576, 1024, 8),
    (1024, 256, 16),
    (1024, 2048, 16),
    (1024, 2048, 4),
]
RANKS = (1, 2, 4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=7,
        help="pairs of runs behind every ratio (at most 8 s are spent on one)",
    )
    parser.add_argument("--quick", action="store_true", help="three shapes of 128 tokens per adapter only")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], nargs="*", default=["float32", "bfloat16"]
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    shapes = [(d, tokens, n) for d, tokens, n in SHAPES if tokens // n == 128] if options.quick else SHAPES
    lines = heading(options.repeats)
    for name in options.dtype:
        dtype = getattr(torch, name)
        lines += [f"## {name}: as a run does it", "", *table(shapes, as_run(), dtype, options.repeats)]
        if not options.quick:
            lines += [
                f"## {name}: each formulation of fLoRA",
                "",
                *table(FORCED, forced(), dtype, options.repeats),
            ]
    text = "\n".join(lines)
    print(text)
    if options.save:
        RESULT.write_text(text)


def heading(repeats: int) -> list[str]:
    return [
        "# Cost of an adapted layer: forward + backward, as a multiple of the frozen layer's",
        "",
        f"{where()}, commit {environment().commit}.",
        f"Median of {repeats} interleaved pairs. `python benchmarks/layer.py --save` prints this file. "
        "fLoRA is residual unless",
        "it says pure (W0 * (B A)); a residual one has one term more to expand. Three matmuls instead of "
        "two: 1.5 is the floor of",
        "materialised fLoRA, and with the thin ones of rank r at m tokens per adapter 1.5 + 2 r / m.",
        "",
    ]


Forward = Callable[[Problem], Tensor]


def as_run() -> dict[str, tuple[int, Forward]]:
    """column -> (rank, forward)."""

    def flora(offset: float) -> Forward:
        return lambda p: flora_linear(p.x, p.weight, p.A, p.B, offset=p.numbers(offset), segments=p.segments)

    def lora(p: Problem) -> Tensor:
        return lora_add(p.frozen(), p.x, p.A, p.B, scaling=p.numbers(1.0), segments=p.segments)

    return {
        "fLoRA pure r=1": (1, flora(PURE)),
        **{f"fLoRA r={rank}": (rank, flora(RESIDUAL)) for rank in RANKS},
        **{f"LoRA r={rank}": (rank, lora) for rank in RANKS},
        "IA3": (1, lambda p: ia3_scale(p.frozen(), p.A[:, 0], p.segments)),
    }


def forced() -> dict[str, tuple[int, Forward]]:
    """column -> (rank, forward)."""

    def form(formulation: str) -> Forward:
        function = TORCH_FORMULATIONS[formulation]  # type: ignore[index]
        return lambda p: function.apply(
            p.x, p.weight, p.A, p.B, p.numbers(RESIDUAL), p.segments, splits(p.x.dtype)
        )

    return {f"{name} r={rank}": (rank, form(name)) for name in TORCH_FORMULATIONS for rank in (1, 4, 16)}


def table(
    shapes: Sequence[Shape], columns: dict[str, tuple[int, Forward]], dtype: torch.dtype, repeats: int
) -> list[str]:
    """Markdown."""
    lines = [
        f"| d, tokens, adapters (tokens each) | {' | '.join(name.replace('_', ' ') for name in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for shape in shapes:
        d, tokens, adapters = shape
        ratios = [Problem(*shape, rank, dtype).ratio(forward, repeats) for rank, forward in columns.values()]
        lines.append(
            f"| {d}, {tokens}, {adapters} ({tokens // adapters}) | "
            f"{' | '.join(f'{ratio:.2f}' for ratio in ratios)} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
