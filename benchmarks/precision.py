"""What half precision loses of an adapter near the identity, and the cost and effect of
`kernels.precision=split`.

Four tables: the share of an adapter's effect that the output shows; forward and backward of split as a
multiple of fused (interleaved); with --train, held-out bits per byte after the same short run in float32 and
in bfloat16 both ways; and the error of values and gradients for every mean of M.

Usage: python benchmarks/precision.py [--repeats 9] [--train] [--save]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from adapted_layer import DEVICE, Problem, seconds, where

# isort: split
import torch
from torch import Tensor

from flora_train.commands.train import train_run
from flora_train.config.load import load_config
from flora_train.kernels.backend import why_not_triton
from flora_train.kernels.flora.cost_model import Formulation
from flora_train.kernels.flora.op import TORCH_FORMULATIONS, formulation
from flora_train.kernels.flora.reference import flora_reference

RESULT = Path(__file__).parent / "results" / f"precision_{DEVICE.type}.md"
DEVIATIONS = (1e-4, 1e-3, 3e-3, 1e-2, 1e-1)
MEANS = (0.01, 0.1, 0.5, 1.01, 2.0, 10.0, -0.1)
NAMES: list[Formulation] = [
    *TORCH_FORMULATIONS,
    *(["fused"] if DEVICE.type == "cuda" and why_not_triton(DEVICE) is None else []),
]
DTYPES = {"bfloat16": torch.bfloat16} | ({"float16": torch.float16} if DEVICE.type == "cuda" else {})
TRAINED = {
    "float32": ("float32", "auto"),
    "bfloat16, split": ("bfloat16", "split"),
    "bfloat16, fused": ("bfloat16", "fused"),
}
OVERRIDES = (
    "tasks.perl.weight=0.001 tasks.ruby.weight=0.001 mixture.strategy=uniform training.steps=20 "
    "training.tokens_per_step=1024 "
    "training.tokens_per_microbatch=1024 evaluation.interval=null evaluation.max_new_tokens=1"
)


def run(problem: Problem, name: Formulation, offset: float, split: bool) -> Tensor:
    arguments = (
        problem.x,
        problem.weight,
        problem.A,
        problem.B,
        problem.numbers(offset),
        problem.segments,
        split,
    )
    return formulation(name).apply(*arguments)


def near_identity(d: int, rank: int, offset: float, deviation: float, dtype: torch.dtype) -> Problem:
    """1024 tokens of two adapters with a mean |M - 1| of about `deviation`."""
    problem = Problem(d, 1024, 2, rank, dtype, deviation / rank**0.5)
    if not offset:
        with torch.no_grad():
            problem.A[:, 0] = 1 + deviation * problem.A[:, 0]
            problem.B[:, :, 0] += 1
    return problem


def kept(problem: Problem, name: Formulation, offset: float, split: bool) -> float:
    """Share of the adapter's effect in y. Rounding y adds noise, but removes nothing."""
    x, weight, A, B = (
        tensor.detach().double() for tensor in (problem.x, problem.weight, problem.A, problem.B)
    )
    base = x @ weight.T
    effect = (
        flora_reference(x, weight, A, B, offset=problem.numbers(offset), segments=problem.segments) - base
    )
    return float(
        ((run(problem, name, offset, split).detach().double() - base) * effect).sum() / effect.square().sum()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="interleaved pairs behind every ratio")
    parser.add_argument(
        "--train", action="store_true", help="also train SmolLM2 three times (about 10 minutes on two cores)"
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    lines = [
        *heading(),
        *kept_table(),
        *cost_table(options.repeats),
        *(trained_table() if options.train else []),
        *far_table(),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text)


def heading() -> list[str]:
    return [
        "# fLoRA in half precision: split or fused",
        "",
        f"{where()}. `python benchmarks/precision.py --train --save` prints this file.",
        "",
    ]


def kept_table() -> list[str]:
    """Markdown."""
    lines = [
        "## Share of the adapter's effect on y that y shows (1 is all of it), split / fused",
        "",
        "| dtype | adapter | mean abs(M - 1) | "
        + " | ".join(name.replace("_", " ") for name in NAMES)
        + " |",
        "|---" * (len(NAMES) + 3) + "|",
    ]
    for dtype_name, dtype in DTYPES.items():
        for label, rank, offset in (("pure r 1", 1, 0.0), ("pure r 4", 4, 0.0), ("residual r 4", 4, 1.0)):
            for deviation in DEVIATIONS:
                problem = near_identity(256, rank, offset, deviation, dtype)
                cells = (
                    f"{kept(problem, name, offset, True):.2f} / {kept(problem, name, offset, False):.2f}"
                    for name in NAMES
                )
                lines.append(f"| {dtype_name} | {label} | {deviation:g} | {' | '.join(cells)} |")
    return [*lines, ""]


def cost_table(repeats: int) -> list[str]:
    """Markdown."""
    lines = [
        "## Forward + backward, split as a multiple of fused",
        "",
        "| dtype | d | adapter | " + " | ".join(name.replace("_", " ") for name in NAMES) + " |",
        "|---" * (len(NAMES) + 3) + "|",
    ]
    for dtype_name, dtype in DTYPES.items():
        for d in (576, 1024) if DEVICE.type == "cpu" else (2048, 4096):
            for label, rank, offset in (
                ("pure r 1", 1, 0.0),
                ("residual r 4", 4, 1.0),
                ("residual r 16", 16, 1.0),
            ):
                problem = Problem(d, 1024 if DEVICE.type == "cpu" else 8192, 2, rank, dtype)
                cells = [f"{ratio(problem, name, offset, repeats):.2f}" for name in NAMES]
                lines.append(f"| {dtype_name} | {d} | {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def ratio(problem: Problem, name: Formulation, offset: float, repeats: int) -> float:
    """The median ratio split / fused over interleaved pairs."""

    def timed(split: bool) -> float:
        return seconds(lambda: run(problem, name, offset, split).backward(problem.dy))

    timed(True), timed(False)
    return statistics.median(timed(True) / timed(False) for _ in range(repeats))


def trained_table() -> list[str]:
    """Markdown: the quickstart's Lua task, fLoRA only, at two learning rates and in both variants, the same
    examples."""
    adapters = [
        f"adapters.{variant}_{name}={{method: flora, rank: 4, variant: {variant}, lr: {lr}, tasks: [lua]}}"
        for variant in ("pure", "residual")
        for name, lr in (("small", 1e-3), ("large", 1e-2))
    ]
    found: dict[str, dict[str, float]] = {}
    for label, (dtype, precision) in TRAINED.items():
        with tempfile.TemporaryDirectory() as folder:
            words = [
                "recipe=quickstart",
                *OVERRIDES.split(),
                *adapters,
                f"model.dtype={dtype}",
                f"kernels.precision={precision}",
            ]
            config = load_config([*words, f"output_dir={folder}/run"])
            only = {
                name: adapter
                for name, adapter in config.adapters.items()
                if name.startswith(("pure", "residual"))
            }
            config = config.model_copy(update={"adapters": only, "tasks": {"lua": config.tasks["lua"]}})
            results = json.loads((train_run(config) / "eval" / "report.json").read_text())["results"][0]
        found[label] = {c["family"]: c["bits_per_byte"]["value"] for c in results["contenders"]}
        found[label]["base"] = results["base"]["bits_per_byte"]["value"]
    families = list(next(iter(found.values())))
    lines = [
        (
            "## Held-out bits per byte on Lua after 20 steps of 1024 tokens, "
            "four fLoRA adapters of rank 4 in one run, one seed"
        ),
        "",
        "| base and precision | "
        f"{' | '.join(family.replace('_', ', ') + (' lr' if '_' in family else '') for family in families)} "
        "|",
        "|---" * (len(families) + 1) + "|",
    ]
    lines += [
        f"| {label} | {' | '.join(f'{row[family]:.4f}' for family in families)} |"
        for label, row in found.items()
    ]
    return [*lines, "", "small: learning rate 1e-3; large: 1e-2.", ""]


def far_table() -> list[str]:
    """Markdown: the largest relative root mean square error of y and of the gradients of x, A and B, against
    float64."""
    lines = [
        (
            "## Error of value and gradients wherever M is: the worst of y, dX, dA and dB, relative root "
            "mean square, split / fused"
        ),
        "",
        "| dtype | adapter | mean M | " + " | ".join(name.replace("_", " ") for name in NAMES) + " |",
        "|---" * (len(NAMES) + 3) + "|",
    ]
    for dtype_name, dtype in DTYPES.items():
        for label, rank, offset in (("pure r 1", 1, 0.0), ("pure r 4", 4, 0.0), ("residual r 4", 4, 1.0)):
            for mean in MEANS:
                cells = [
                    " / ".join(
                        f"{worst_error(name, dtype, rank, mean, offset, split):.4f}"
                        for split in (True, False)
                    )
                    for name in NAMES
                ]
                lines.append(f"| {dtype_name} | {label} | {mean:g} | {' | '.join(cells)} |")
    return [*lines, ""]


def worst_error(
    name: Formulation, dtype: torch.dtype, rank: int, mean: float, offset: float, split: bool
) -> float:
    """M = mean within a few percent; its size is in B and, for a mean above 0, also in A and B equally: the
    worse of both."""
    found = []
    for in_a in (1.0, abs(mean - offset) ** 0.5):
        problem = Problem(256, 1024, 2, rank, dtype, 0.0)
        generator = torch.Generator().manual_seed(rank)
        noise = [
            torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in (problem.A, problem.B)
        ]
        with torch.no_grad():
            problem.A.copy_(noise[0])
            problem.A[:, 0] = in_a * (1 + 0.05 * noise[0][:, 0])
            problem.B.copy_(0.05 * abs(mean - offset) / rank**0.5 * noise[1])
            problem.B[:, :, 0] = (mean - offset) / in_a * (1 + 0.05 * noise[1][:, :, 0])
        ours = run(problem, name, offset, split)
        leaves = (problem.x, problem.A, problem.B)
        gradients = torch.autograd.grad(ours, leaves, problem.dy)
        exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
        y = flora_reference(
            exact[0],
            problem.weight.detach().double(),
            exact[1],
            exact[2],
            offset=problem.numbers(offset),
            segments=problem.segments,
        )
        expected = torch.autograd.grad(y, exact, problem.dy.double())
        pairs = [(ours.detach(), y.detach()), *zip(gradients, expected, strict=True)]
        found += [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
    return max(found)


if __name__ == "__main__":
    main()
