"""flora-train doctor: what would run for this model, on this machine, and why? Nothing is loaded but configurations."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flora_train.adapters.base_model import empty_model, resolve_dtype
from flora_train.adapters.spec import AdapterSpec, expand
from flora_train.adapters.targets import find_targets
from flora_train.config.errors import UserError
from flora_train.config.schema import RunConfig
from flora_train.kernels.backend import runs_in_triton, splits, use_backend, use_precision, why_not_triton
from flora_train.kernels.cost_model import Work, calibrated_on, decide, thresholds_for
from flora_train.training.environment import environment

WHAT_RUNS = {
    "rank_expanded": "fLoRA: rank expansion",
    "materialised": "fLoRA: W0 * M, an adapter at a time",
    "grouped": "fLoRA: W0 * M, all adapters at once",
    "fused": "fLoRA: Triton, W0 * M tile by tile",
    "scaled": "fLoRA: Triton, two scales around W0",
}


@dataclass(frozen=True)
class Line:
    """What a family's adapters do in layers of one shape."""

    family: str
    layers: str
    shape: str
    runs: str
    why: str


def doctor(config: RunConfig) -> None:
    """Print device, backend, precision and the formulation of every family and layer shape. Raises UserError as the run would:
    for a model or target that is not there, or a backend that cannot run here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(config.model.dtype, device)
    refused = None
    try:
        use_backend(config.kernels.backend, device)
    except UserError as error:
        refused = error
    use_precision(config.kernels.precision)
    console = Console(soft_wrap=True)
    for name, value in _facts(config, device, dtype):
        console.print(f"{name:11} {value}", highlight=False)
    specs = expand(config)
    each = config.training.tokens_per_microbatch / len(specs)
    console.print(
        f"\nA micro-batch of {config.training.tokens_per_microbatch} tokens, shared evenly by {len(specs)} adapters:",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("adapters", "layers", "in x out", "what runs", "why"):
        table.add_column(heading, overflow="fold")
    for line in lines(specs, empty_model(config.model), each, dtype, device):
        table.add_row(line.family, line.layers, line.shape, line.runs, line.why)
    console.print(table)
    if refused is not None:
        raise refused


def _facts(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    facts = environment()
    yield (
        "versions",
        f"Python {facts['python']}, " + ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
    )
    machine = facts["machine"]
    yield "device", f"{device}: {machine['gpu'] or machine['processor']}, {machine['cpus']} CPUs"
    yield "base", f"{config.model.path} in {str(dtype).removeprefix('torch.')} (model.dtype={config.model.dtype})"
    triton = why_not_triton(device)
    yield (
        "backend",
        ("triton" if runs_in_triton(torch.empty(0, dtype=dtype)) else "torch") + f" (kernels.backend={config.kernels.backend})",
    )
    yield "triton", triton or "can run here; kernels.backend=triton asks for it"
    half = (
        "M - 1 is kept apart from 1"
        if splits(dtype)
        else "no part of M is kept apart"
        if dtype.itemsize == 2
        else "has no meaning in float32"
    )
    yield "precision", f"{half} (kernels.precision={config.kernels.precision})"
    measured = calibrated_on(device.type)
    yield "thresholds", f"measured on {measured}" if measured else f"not measured on a {device.type} device: a CPU's rule"


def lines(specs: Sequence[AdapterSpec], model: Any, each: float, dtype: torch.dtype, device: torch.device) -> Iterator[Line]:
    """Family by family, one line for every shape of layer. each: tokens of an adapter."""
    families: dict[str, list[AdapterSpec]] = defaultdict(list)
    for spec in specs:
        families[spec.family].append(spec)
    for family, members in families.items():
        spec, count = members[0], len(members)
        targets = find_targets(model, spec).values()
        shapes: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
        for target in targets:
            shapes[target.in_features, target.out_features][target.name.rpartition(".")[2]] += 1
        for (in_features, out_features), names in shapes.items():
            layers = ", ".join(f"{number} {name}" for name, number in names.items())
            runs, why = _what_runs(spec, count, each, in_features, out_features, dtype, device)
            label = f"{count} x {family}" + (f", r {spec.rank}" if spec.rank else "")
            yield Line(label, layers, f"{in_features} x {out_features}", runs, why)


def _what_runs(
    spec: AdapterSpec, count: int, each: float, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    triton = runs_in_triton(torch.empty(0, dtype=dtype))
    where = "Triton" if triton else "torch"
    if spec.method == "lora":
        return f"LoRA: {where}, shrink and expand", "the base layer, and two thin matmuls that add to its output"
    if spec.method == "ia3":
        return f"IA3: {where}, one scale", "the base layer, and a product a feature"
    work = Work(
        rank=spec.rank,
        residual=bool(spec.offset),
        tokens=round(each * count),
        segments=count,
        in_features=in_features,
        out_features=out_features,
        bytes_each=dtype.itemsize,
        split=splits(dtype),
        device=device.type,
        triton=triton,
    )
    decision = decide(work, thresholds_for(work))
    return WHAT_RUNS[decision.formulation], decision.why
