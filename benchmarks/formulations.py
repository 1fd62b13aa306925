"""fLoRA beside other implementations and beside LoRA: forward and backward as a multiple of a frozen linear
layer.

Compared are flora_train (the cost model chooses), the paper's rank expansion, W0 * M formed for F.grouped_mm,
LoRA with torch.bmm as in the paper, flora_train's LoRA, and PEFT's HiRA (which loops over adapters). All
adapters are pure, as in the paper. Runs alternate with the frozen layer's; each figure is the median of the
pairs' ratios. Prints Markdown; `--save` writes it and the plot of the critical rank.

Usage: python benchmarks/kernels.py [--repeats 3] [--quick] [--precision fused] [--save]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapted_layer import DEVICE, PURE, Problem, where

# isort: split
import torch
from contenders.grouped_mm import grouped_mm_flora
from contenders.peft_layer import peft_hira
from torch import Tensor

from flora_train.kernels.backend import splits, use_backend, use_precision, why_not_triton
from flora_train.kernels.flora.materialised import RankExpandedFlora
from flora_train.kernels.flora.op import flora_linear
from flora_train.kernels.lora.op import lora_add

RESULTS = Path(__file__).parent / "results"
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
WIDTHS = (4096, 2048) if ON_GPU else (512, 1024)
TOKENS = (8192,) if ON_GPU else (512, 2048)
EACH = (32, 128, 256, 1024, 8192) if ON_GPU else (1, 8, 32, 128, 512, 2048)
MOST_ADAPTERS = 128
"""More adapters only with one token each: the extreme case of one adapter per token."""
RANKS = (1, 2, 4, 16, 32, 64) if ON_GPU else (1, 2, 4, 8, 16, 32, 64)
MOST_BYTES = (24 if ON_GPU else 3) << 30
MOST_SECONDS = 2.5

Forward = Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Contender:
    """forms_weights: stores W0 * M of all adapters at the same time; loops: once per adapter."""

    forward: Forward
    forms_weights: bool = False
    loops: bool = False


def ours(p: Problem) -> Tensor:
    return flora_linear(p.x, p.weight, p.A, p.B, offset=p.numbers(PURE), segments=p.segments)


def rank_expansion(p: Problem) -> Tensor:
    return RankExpandedFlora.apply(p.x, p.weight, p.A, p.B, p.numbers(PURE), p.segments, splits(DTYPE))


def bmm_lora(p: Problem) -> Tensor:
    """Two batched matmuls over the adapters and a sum, as autograd differentiates them."""
    x, A, B = p.x.view(p.adapters, -1, p.x.shape[1]), p.A.to(DTYPE), p.B.to(DTYPE)
    return p.frozen() + torch.bmm(torch.bmm(x, A.mT), B.mT).flatten(0, 1)


def our_lora(p: Problem) -> Tensor:
    return lora_add(p.frozen(), p.x, p.A, p.B, scaling=p.numbers(1.0), segments=p.segments)


CONTENDERS = {
    "fLoRA, ours": Contender(ours),
    "fLoRA, rank expansion (paper)": Contender(rank_expansion),
    "fLoRA, F.grouped_mm": Contender(grouped_mm_flora, forms_weights=True),
    "HiRA, PEFT": Contender(peft_hira, loops=True),
    "LoRA, ours": Contender(our_lora),
    "LoRA, torch.bmm": Contender(bmm_lora),
}


@dataclass(frozen=True)
class Row:
    """A shape, and the cost of every contender; None: it does not fit into memory."""

    d: int
    tokens: int
    each: int
    rank: int
    ratios: dict[str, float | None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help=f"pairs of runs behind every ratio (at most {MOST_SECONDS} s)"
    )
    parser.add_argument("--quick", action="store_true", help="the smallest width and batch only")
    parser.add_argument("--precision", choices=["auto", "fused"], default="auto", help="kernels.precision")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS}")
    options = parser.parse_args()
    if ON_GPU and why_not_triton(DEVICE) is None:
        use_backend("triton", DEVICE)
    use_precision(options.precision)
    shapes = list(grid(options.quick))
    began, rows = time.monotonic(), []
    suffix = DEVICE.type + ("" if options.precision == "auto" else f"_{options.precision}")
    for i, shape in enumerate(shapes):
        rows.append(measure(*shape, options.repeats))
        if options.save and (i + 1 == len(shapes) or shapes[i + 1][:2] != shape[:2]):  # a batch is complete
            (RESULTS / f"kernels_{suffix}.md").write_text("\n".join(report(rows, options.repeats)) + "\n")
            plot(rows, RESULTS / f"critical_rank_{suffix}.svg")
        left = (time.monotonic() - began) / (i + 1) * (len(shapes) - i - 1)
        print(f"\r{i + 1}/{len(shapes)} shapes, {left:.0f} s left", end="", flush=True)
    print("\r" + " " * 40)
    print("\n".join(report(rows, options.repeats)))


def grid(quick: bool) -> Iterator[tuple[int, int, int, int]]:
    """(d, tokens, tokens of each adapter, rank)."""
    for d in WIDTHS[:1] if quick else WIDTHS:
        for tokens in TOKENS[:1] if quick else TOKENS:
            for each in EACH:
                if each <= tokens and (tokens // each <= MOST_ADAPTERS or each == 1):
                    for rank in RANKS:
                        factors = (
                            2 * tokens // each * rank * d * 4
                        )  # and their gradients, twice while one is added
                        if 3 * factors <= MOST_BYTES:
                            yield d, tokens, each, rank


def measure(d: int, tokens: int, each: int, rank: int, repeats: int) -> Row:
    adapters = tokens // each
    problem = Problem(d, tokens, adapters, rank, DTYPE)
    ratios: dict[str, float | None] = {}
    for name, contender in CONTENDERS.items():
        expanded = tokens * d * rank * DTYPE.itemsize * 4
        too_large = contender.forms_weights and adapters * d * d * DTYPE.itemsize * 2 > MOST_BYTES
        too_large |= contender.loops and adapters > MOST_ADAPTERS
        too_large |= contender.forward is rank_expansion and expanded > MOST_BYTES
        try:
            ratios[name] = None if too_large else problem.ratio(contender.forward, repeats, MOST_SECONDS)
        except torch.cuda.OutOfMemoryError:
            ratios[name] = None
    return Row(d, tokens, each, rank, ratios)


def report(rows: Sequence[Row], repeats: int) -> list[str]:
    """Markdown."""
    lines = [
        "# fLoRA beside its alternatives: forward + backward as a multiple of a frozen linear layer",
        "",
        f"{where()}, {DTYPE}. Median of up to {repeats} interleaved pairs. Pure adapters. `python "
        "benchmarks/kernels.py --save` prints this",
        (
            "file. -: does not fit, or would loop over more than 128 adapters. "
            "At one token each every token has its own adapter."
        ),
        "",
        (
            f"| d, tokens | adapters x tokens each | rank | {' | '.join(CONTENDERS)} | "
            "ours / best other way of fLoRA |"
        ),
        "|---" * (len(CONTENDERS) + 4) + "|",
    ]
    for row in rows:
        cells = ("-" if ratio is None else f"{ratio:.2f}" for ratio in row.ratios.values())
        lines.append(
            f"| {row.d}, {row.tokens} | {row.tokens // row.each} x {row.each} | {row.rank} | "
            f"{' | '.join(cells)} | {against_best(row):.2f} |"
        )
    worst = max(rows, key=against_best)
    lines += [
        "",
        f"Ours against the fastest other way of fLoRA: at worst {against_best(worst):.2f} times its time "
        f"(d {worst.d}, {worst.tokens // worst.each} x {worst.each} tokens, rank {worst.rank}), geometric "
        "mean "
        f"{math.exp(sum(math.log(against_best(row)) for row in rows) / len(rows)):.2f}.",
        "",
        *critical_table(rows),
    ]
    return lines


def against_best(row: Row) -> float:
    """flora_train as a multiple of the fastest other formulation of the same adapter."""
    others = [
        row.ratios[name] for name in ("fLoRA, rank expansion (paper)", "fLoRA, F.grouped_mm", "HiRA, PEFT")
    ]
    mine = row.ratios["fLoRA, ours"] or math.nan
    return mine / min((other for other in others if other is not None), default=mine)


LIMITS = (1.0, 2.0)


def critical_ranks(rows: Sequence[Row], name: str, limit: float) -> dict[tuple[int, int], dict[int, int]]:
    """(d, tokens) -> tokens of each adapter -> the largest rank (0: none) up to which the contender costs at
    most `limit` times LoRA of the same rank through torch.bmm."""
    found: dict[tuple[int, int], dict[int, int]] = {}
    for row in rows:
        mine, lora = row.ratios[name], row.ratios["LoRA, torch.bmm"]
        at = found.setdefault((row.d, row.tokens), {})
        at.setdefault(row.each, 0)
        if mine is not None and lora is not None and mine <= limit * lora:
            at[row.each] = max(at[row.each], row.rank)
    return found


def critical_table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    lines = [
        (
            "## Critical rank: up to which rank fLoRA costs no more than LoRA (torch.bmm) of the same rank, "
            "and than twice that"
        ),
        "",
        "| d, tokens | tokens each | paper: as LoRA | paper: 2 x LoRA | ours: as LoRA | ours: 2 x LoRA |",
        "|---|---|---|---|---|---|",
    ]
    columns = [critical_ranks(rows, name, limit) for name in list(CONTENDERS)[1::-1] for limit in LIMITS]
    for (d, tokens), by_each in columns[0].items():
        for each in by_each:
            cells = (column[d, tokens][each] for column in columns)
            lines.append(
                f"| {d}, {tokens} | {each} | {' | '.join(str(rank) if rank else 'none' for rank in cells)} |"
            )
    return [*lines, "", f"Ranks measured: {', '.join(map(str, RANKS))}."]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Critical rank against tokens per adapter: one panel a width, one line a batch size."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "flora_train"
    from matplotlib import pyplot as plt

    widths = sorted({row.d for row in rows})
    figure, panels = plt.subplots(
        1, len(widths), figsize=(4.5 * len(widths), 3.8), sharey=True, squeeze=False
    )
    places = [0, *RANKS]
    for panel, d in zip(panels[0], widths, strict=True):
        for name, colour in (("fLoRA, ours", "#0b6e4f"), ("fLoRA, rank expansion (paper)", "#c1440e")):
            for tokens, style in zip(sorted({row.tokens for row in rows}), ("--", "-"), strict=False):
                by_each = critical_ranks(rows, name, LIMITS[1]).get((d, tokens), {})
                ranks = [places.index(rank) for rank in by_each.values()]
                panel.plot(
                    list(by_each),
                    ranks,
                    style,
                    color=colour,
                    marker="o",
                    label=f"{name.removeprefix('fLoRA, ')}, {tokens} tokens",
                )
        panel.set(xscale="log", title=f"d = {d}", xlabel="tokens per adapter")
        panel.set_yticks(range(len(places)), ["none", *map(str, RANKS)])
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("largest rank within 2 x LoRA of that rank")
    panels[0][-1].legend(fontsize=8)
    figure.suptitle(f"Critical rank of pure fLoRA, forward + backward, {where()}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
