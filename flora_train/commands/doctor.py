"""flora-train doctor: what would run for this model, on this machine, and why? Nothing is loaded but configurations."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage

import torch
from rich.console import Console

from flora_train.adapters.host_memory import free_memory
from flora_train.adapters.layer_usage import unusable_by_shape
from flora_train.adapters.pool import Pool, build_pools
from flora_train.adapters.spec import AdapterSpec, expand
from flora_train.config.errors import UserError
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import shown
from flora_train.evaluation.code.programs.execute import preflight
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.programs.sandbox import Limits, Sandbox, open_sandbox
from flora_train.evaluation.code.programs.seccomp import deny_filter
from flora_train.kernels.backend import runs_in_triton, splits, use_backend, use_precision, why_not_triton
from flora_train.kernels.flora.cost_model import Work, calibrated_on, decide, thresholds_for
from flora_train.models.loading import check_quantiser, empty_model, resolve_dtype
from flora_train.run_context import resolve_config
from flora_train.runtime.environment import available_cpus, default_device, environment, versions_line

WHAT_RUNS = {
    "rank_expanded": "tokens through W0 once a term (rank expansion, torch)",
    "materialised": "W0 * M formed an adapter at a time (torch)",
    "grouped": "W0 * M formed for all adapters at once (torch)",
    "fused": "W0 * M formed tile by tile (Triton)",
    "scaled": "W0 between two scales (Triton)",
}


@dataclass(frozen=True)
class Choice:
    """What a family's adapters do in some of their layers."""

    runs: str
    why: str


def check_recipe(config: RunConfig) -> None:
    """Print device, backend, precision and the formulation of every family and layer shape. Raises UserError as the run would:
    for a model or target that is not there, or a backend that cannot run here."""
    config = resolve_config(config)
    device = default_device()
    dtype = resolve_dtype(config.model.dtype, device)
    refused = None
    try:
        use_backend(config.kernels.backend, device)
        check_quantiser(config.model, device)
    except UserError as error:
        refused = error
    use_precision(config.kernels.precision)
    console = Console(soft_wrap=True)
    for name, value in _facts(config, device, dtype):
        console.print(shown(f"{name:11} {value}"))
    specs = expand(config)
    each = config.training.tokens_per_microbatch / len(specs)
    console.print(
        shown(f"\nA micro-batch of {config.training.tokens_per_microbatch} tokens, shared evenly by {len(specs)} adapters:")
    )
    model = empty_model(config.model)
    pools, _ = build_pools(model, specs, unusable_by_shape(config.model, model))
    for pool in pools:
        members = pool.specs
        families = Counter(spec.family for spec in members)
        rank = f", rank {members[0].rank}" if members[0].rank else ""
        names = " + ".join(f"{number} x {family}" for family, number in families.items())
        console.print(shown(f"\n{names}{rank}", "bold"))
        for choice, layers in choices_of(pool, each, dtype, device).items():
            console.print(shown(f"  {', '.join(layers)}\n      {choice.runs}\n      {choice.why}"))
    if refused is not None:
        raise refused


def _facts(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    facts = environment()
    yield "versions", versions_line(facts)
    machine = facts["machine"]
    yield "device", f"{device}: {machine['gpu'] or machine['processor']}, {machine['cpus']} CPUs"
    yield (
        "base",
        f"{config.model.path} in {str(dtype).removeprefix('torch.')} (model.dtype={config.model.dtype}), quantization {config.model.quantization}",
    )
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
    measured = calibrated_on(Work(1, False, 1, 1, 1, 1, device=device.type, triton=runs_in_triton(torch.empty(0, dtype=dtype))))
    yield "thresholds", f"measured on {measured}" if measured else "not measured on such a device: a CPU's"


def choices_of(pool: Pool, each: float, dtype: torch.dtype, device: torch.device) -> dict[Choice, list[str]]:
    """Choice -> the layers that use it, as `60 q_proj 576 x 576`. each: tokens of an adapter."""
    kinds = Counter((target.name.rpartition(".")[2], target.in_features, target.out_features) for target in pool.targets.values())
    found: dict[Choice, list[str]] = defaultdict(list)
    for (name, in_features, out_features), count in kinds.items():
        choice = _choice(pool.specs, each, in_features, out_features, dtype, device)
        found[choice].append(f"{count} {name} {in_features} x {out_features}")
    return found


def _choice(
    members: Sequence[AdapterSpec], each: float, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
) -> Choice:
    spec = members[0]
    triton = runs_in_triton(torch.empty(0, dtype=dtype), spec.rank)
    where = "Triton" if triton else "torch"
    if spec.method == "lora":
        return Choice(f"shrink and expand ({where})", "the base layer, and two thin matmuls that add to its output")
    if spec.method == "ia3":
        return Choice(f"one scale ({where})", "the base layer, and a product a feature")
    work = Work(
        rank=spec.rank,
        residual=any(spec.offset for spec in members),
        tokens=round(each * len(members)),
        segments=len(members),
        in_features=in_features,
        out_features=out_features,
        bytes_each=dtype.itemsize,
        split=splits(dtype),
        device=device.type,
        triton=triton,
    )
    decision = decide(work, thresholds_for(work))
    return Choice(WHAT_RUNS[decision.formulation], decision.why)


EXTRAS = {
    "hub": ("data sets of the hub", ["datasets"]),
    "parquet": (".parquet files", ["pyarrow"]),
    "speech": ("speech tasks", ["soundfile", "soxr", "jiwer", "evaluate"]),
    "quantised": ("a base in 8 or 4 bits", ["bitsandbytes"]),
    "wandb": ("wandb", ["wandb"]),
    "tensorboard": ("tensorboard", ["tensorboard"]),
}
"""Extra of the package -> what it is for, and its modules."""


def check_machine() -> None:
    """Print it. Programs of every language are run once, in the sandbox; the hub is not asked anything."""
    console = Console(soft_wrap=True)
    for name, value in _findings():
        console.print(shown(f"{name:11} {value}"))


def _findings() -> Iterator[tuple[str, str]]:
    facts = environment()
    yield "versions", versions_line(facts)
    machine = facts["machine"]
    yield "machine", f"{machine['processor']}, {available_cpus()} CPUs, {free_memory() / 1e9:.1f} GB of memory free"
    yield "GPU", _gpu()
    yield "triton", why_not_triton(default_device()) or "can run here"
    yield "disk", f"{disk_usage(Path.cwd()).free / 1e9:.1f} GB free here (runs are in outputs/)"
    for extra, (purpose, modules) in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        yield extra, f"{purpose}: " + (f"not installed: pip install 'flora-train[{extra}]'" if missing else "ready")
    yield "hub login", _login()
    try:
        sandbox = open_sandbox("bubblewrap")
    except UserError as error:
        yield "sandbox", str(error.problems[0])
        return
    yield "sandbox", "bubblewrap confines programs here"
    yield "memory", _memory(sandbox)
    languages = load_languages()
    broken = preflight(languages.values(), sandbox)
    yield (
        "languages",
        f"{len(languages) - len(broken)} of {len(languages)} can be evaluated: {', '.join(key for key in languages if key not in broken)}",
    )
    for key, reason in broken.items():
        yield f"  {key}", reason


def _memory(sandbox: Sandbox) -> str:
    """What bounds the memory of generated programs here."""
    limits = Limits(cpu=1)
    sum_of_all = f"{limits.memory >> 30} GiB of data a process (kernel), and over all processes of a program together (looked at every 20 ms)"
    if sandbox.filtered and deny_filter() is not None:
        return f"{sum_of_all}; memory that a look does not see is denied"
    return f"{sum_of_all}; this kernel or machine does not deny memory that a look does not see (memfd, System V)"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees: everything runs on the CPU"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _login() -> str:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1: nothing is asked of the hub"
    return "a token is here" if get_token() else "none (needed for gated data and flora-train push): hf auth login"
