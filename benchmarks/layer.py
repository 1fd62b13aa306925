"""What does an adapted layer cost? Forward + backward against the same frozen layer, on this machine.

Runs of the adapted and the frozen layer alternate; each figure is the median of the pairs' ratios. Materialised fLoRA is
residual, expanded fLoRA pure (a residual one costs one rank more). Prints a Markdown table, and writes it with `--save`. Usage: python benchmarks/layer.py [--repeats 15] [--save]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import flora_train.cli  # noqa: F401  (before torch: how its threads wait, as in a run)

# isort: split
import torch
from torch import Tensor
from torch.nn import functional as F

from flora_train.kernels.flora_torch import MaterialisedFlora, RankExpandedFlora
from flora_train.kernels.ia3 import ia3_scale
from flora_train.kernels.lora import lora_add
from flora_train.kernels.segments import Segments
from flora_train.training.environment import environment

RESULT = Path(__file__).parent / "results" / "layer_cpu.md"
SHAPES = [(576, 1024, 8), (576, 1024, 32), (1024, 2048, 4), (1024, 2048, 16), (1024, 256, 16)]  # d, tokens, adapters
RANKS = (1, 4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="pairs of runs behind every ratio")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    lines = [*heading(options.repeats)]
    for dtype in options.dtype:
        lines += table(getattr(torch, dtype), options.repeats)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text)


def heading(repeats: int) -> list[str]:
    facts = environment()
    machine, packages = facts["machine"], facts["packages"]
    return [
        "# Cost of an adapted layer: forward + backward, as a multiple of the frozen layer's",
        "",
        f"{machine['processor']}, {machine['threads']} threads, torch {packages['torch']}, Python {facts['python']}, commit {facts['commit']}.",
        f"Median of {repeats} interleaved pairs. `python benchmarks/layer.py --save` prints this file.",
        "Materialised fLoRA is residual, expanded fLoRA pure (a residual one costs one rank more).",
        "",
    ]


def table(dtype: torch.dtype, repeats: int) -> list[str]:
    ranks = [f"{name} r={rank}" for name in ("materialised", "expanded", "lora") for rank in RANKS]
    lines = [
        f"## {str(dtype).removeprefix('torch.')}",
        "",
        f"| d, tokens, adapters (tokens each) | {' | '.join([*ranks, 'ia3'])} |",
    ]
    lines.append("|---" * (len(ranks) + 2) + "|")
    for d, tokens, adapters in SHAPES:
        segments = Segments(tuple(range(0, tokens + 1, tokens // adapters)))
        ratios = [
            measure(d, segments, kind, rank, dtype, repeats) for kind in ("materialised", "expanded", "lora") for rank in RANKS
        ]
        ratios.append(measure(d, segments, "ia3", 1, dtype, repeats))
        lines.append(f"| {d}, {tokens}, {adapters} ({tokens // adapters}) | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return [*lines, ""]


def measure(d: int, segments: Segments, kind: str, rank: int, dtype: torch.dtype, repeats: int) -> float:
    """The median ratio adapted / frozen over interleaved pairs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(segments.tokens, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(d, d, generator=generator).to(dtype) / d**0.5
    dy = torch.randn(segments.tokens, d, generator=generator).to(dtype)
    K = len(segments)
    A = torch.randn(K, rank, d, generator=generator).requires_grad_()
    B = (0.1 * torch.randn(K, d, rank, generator=generator)).requires_grad_()
    ones = [1.0] * K
    forms: dict[str, Callable[[], Tensor]] = {
        "materialised": lambda: MaterialisedFlora.apply(x, weight, A, B, ones, segments),
        "expanded": lambda: RankExpandedFlora.apply(x, weight, A, B, [0.0] * K, segments),
        "lora": lambda: lora_add(F.linear(x, weight), x, A, B, ones, segments),
        "ia3": lambda: ia3_scale(F.linear(x, weight), A[:, 0], segments),
    }

    def timed(forward: Callable[[], Tensor]) -> float:
        started = time.perf_counter()
        forward().backward(dy)
        return time.perf_counter() - started

    def frozen() -> Tensor:
        return F.linear(x, weight)

    for forward in (forms[kind], frozen):
        timed(forward)
    return statistics.median(timed(forms[kind]) / timed(frozen) for _ in range(repeats))


if __name__ == "__main__":
    main()
