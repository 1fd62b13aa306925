"""flora-train doctor: prints what this machine can run, and which kernels a recipe would use."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage

import torch
from rich.console import Console

from flora_train.adapters.host_memory import free_memory
from flora_train.adapters.layer_usage import unusable_by_shape
from flora_train.adapters.pool import Pool, build_pools
from flora_train.adapters.spec import AdapterSpec, expand, experts_text, rank_text
from flora_train.commands.plan_federated import clients_together
from flora_train.config.errors import UserError
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import shown
from flora_train.evaluation.code.programs.execute import preflight
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.programs.sandbox import Limits, Sandbox, open_sandbox
from flora_train.evaluation.code.programs.seccomp import deny_filter
from flora_train.kernels.backend import runs_in_triton, splits, use_backend, use_precision, why_not_triton
from flora_train.kernels.flora.cost_model import Work, calibrated_on, decide, thresholds_for
from flora_train.models.loading import check_quantization, empty_model, resolve_dtype
from flora_train.run_context import resolve_config
from flora_train.runtime.environment import available_cpus, default_device, environment, versions_line

FORMULATIONS = {
    "rank_expanded": "tokens through W0 once a term (rank expansion, torch)",
    "materialised": "W0 * M formed an adapter at a time (torch)",
    "grouped": "W0 * M formed for all adapters at once (torch)",
    "fused": "W0 * M formed tile by tile (Triton)",
    "scaled": "W0 between two scales (Triton)",
}
"""Formulation of fLoRA -> its description."""
EXTRAS = {
    "hub": ("data sets of the hub", ["datasets"]),
    "parquet": (".parquet files", ["pyarrow"]),
    "speech": ("speech tasks", ["soundfile", "soxr", "jiwer", "evaluate"]),
    "quantised": ("a base in 8 or 4 bits", ["bitsandbytes"]),
    "wandb": ("wandb", ["wandb"]),
    "tensorboard": ("tensorboard", ["tensorboard"]),
}
"""Extra of the package -> its purpose, and its modules."""


@dataclass(frozen=True)
class Choice:
    """How the adapters of a pool are computed in some of their layers."""

    runs: str
    why: str


def check_recipe(config: RunConfig) -> None:
    """Print device, backend, precision and the formulation of every family and layer shape.

    Raises UserError as the run would: for a missing model or target, or a backend that cannot run here.
    """
    config = resolve_config(config)
    device = default_device()
    dtype = resolve_dtype(config.model.dtype, device)
    refused = None
    try:
        use_backend(config.kernels.backend, device)
        check_quantization(config.model, device)
    except UserError as error:
        refused = error
    use_precision(config.kernels.precision)
    console = Console(soft_wrap=True)
    for name, value in _recipe_facts(config, device, dtype):
        console.print(shown(f"{name:11} {value}"))
    groups, sharers = [expand(config)], "adapters"
    if config.federated is not None:
        groups, sharers = clients_together(config), "clients of a round"
    tokens = config.training.tokens_per_microbatch
    console.print(shown(f"\nA micro-batch of {tokens} tokens, shared evenly by {len(groups[0])} {sharers}:"))
    model = empty_model(config.model)
    for specs in groups:
        pools, _ = build_pools(model, specs, unusable_by_shape(config.model, model))
        for pool in pools:
            console.print(shown(f"\n{_pool_name(pool)}", "bold"))
            for choice, layers in choices_of(pool, tokens / len(specs), dtype, device).items():
                console.print(shown(f"  {', '.join(layers)}\n      {choice.runs}\n      {choice.why}"))
    if refused is not None:
        raise refused


def _pool_name(pool: Pool) -> str:
    families = Counter(spec.family for spec in pool.specs)
    names = " + ".join(f"{number} x {family}" for family, number in families.items())
    smallest, largest = pool.ranks
    if largest:
        names += f", rank {rank_text(largest, smallest)}"
    return names + experts_text(pool.specs[0])


def _recipe_facts(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """(heading, line) of versions, device and settings."""
    facts = environment()
    yield "versions", versions_line(facts)
    machine = facts.machine
    yield "device", f"{device}: {machine.gpu or machine.processor}, {machine.cpus} CPUs"
    base = config.model
    dtype_name = str(dtype).removeprefix("torch.")
    yield "base", f"{base.path} in {dtype_name} (model.dtype={base.dtype}), quantization {base.quantization}"
    in_triton = runs_in_triton(torch.empty(0, dtype=dtype))
    backend = "triton" if in_triton else "torch"
    yield "backend", f"{backend} (kernels.backend={config.kernels.backend})"
    yield "triton", why_not_triton(device) or "can run here; kernels.backend=triton selects it"
    yield "precision", f"{_precision(dtype)} (kernels.precision={config.kernels.precision})"
    machine_name = calibrated_on(Work(1, False, 1, 1, 1, 1, device=device.type, triton=in_triton))
    thresholds = "not measured on such a device: a CPU's"
    if machine_name:
        thresholds = f"measured on {machine_name}"
    yield "thresholds", thresholds


def _precision(dtype: torch.dtype) -> str:
    if splits(dtype):
        return "M - 1 is computed separately from 1"
    if dtype.itemsize == 2:
        return "no part of M is computed separately"
    return "has no meaning in float32"


def choices_of(
    pool: Pool, tokens_per_adapter: float, dtype: torch.dtype, device: torch.device
) -> dict[Choice, list[str]]:
    """Choice -> the layers that use it, as `60 q_proj 576 x 576`."""
    shapes: Counter[tuple[str, int, int, int, int, bool]] = Counter()
    for name, target in pool.targets.items():
        rank = pool.specs[0].at(name).rank
        shape = target.in_features, target.out_features
        shapes[name.rpartition(".")[2], *shape, rank, target.experts, target.block is not None] += 1
    choices: dict[Choice, list[str]] = defaultdict(list)
    for (name, in_features, out_features, rank, of_base, is_of_experts), count in shapes.items():
        members = [replace(spec, rank=rank) for spec in pool.specs]
        # An expert of the base gets a share of the tokens: this counts one expert for each token.
        tokens = tokens_per_adapter / max(of_base, 1)
        label = f"{count} {name} {in_features} x {out_features}"
        if of_base:
            label += f" of {of_base} experts"
        if pool.ranks[0] != pool.ranks[1]:
            label += f" (rank {rank})"
        experts = pool.specs[0].experts
        if is_of_experts and experts is not None:
            label += f" ({experts.top_k} of {experts.count} experts)"
            members *= experts.count
            tokens *= experts.top_k / experts.count
        work = _work(members, tokens, (in_features, out_features), dtype=dtype, device=device)
        choices[_choice(pool.specs[0].layer_method, work)].append(label)
    return choices


def _work(
    members: Sequence[AdapterSpec],
    tokens_per_adapter: float,
    shape: tuple[int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Work:
    rank = members[0].rank
    return Work(
        rank=rank,
        residual=any(spec.offset for spec in members),
        tokens=round(tokens_per_adapter * len(members)),
        segments=len(members),
        in_features=shape[0],
        out_features=shape[1],
        bytes_each=dtype.itemsize,
        split=splits(dtype),
        device=device.type,
        triton=runs_in_triton(torch.empty(0, dtype=dtype), rank),
    )


def _choice(method: str, work: Work) -> Choice:
    backend = "Triton" if work.triton else "torch"
    if method == "lora":
        return Choice(
            f"shrink and expand ({backend})", "the base layer, and two thin matmuls that add to its output"
        )
    if method == "dora":
        return Choice(
            f"shrink, expand and one scale ({backend})",
            "the base layer, two thin matmuls that add to its output, and a product a feature",
        )
    if method == "ia3":
        return Choice(f"one scale ({backend})", "the base layer, and a product a feature")
    decision = decide(work, thresholds_for(work))
    return Choice(FORMULATIONS[decision.formulation], decision.reason)


def check_machine() -> None:
    """Print what this machine can run. Programs of every language are run once, in the sandbox; the hub is
    not contacted."""
    console = Console(soft_wrap=True)
    for facts in (_machine_facts(), _sandbox_facts()):
        for name, value in facts:
            console.print(shown(f"{name:11} {value}"))


def _machine_facts() -> Iterator[tuple[str, str]]:
    """(heading, line) of hardware, packages and login."""
    facts = environment()
    yield "versions", versions_line(facts)
    processor = facts.machine.processor
    yield "machine", f"{processor}, {available_cpus()} CPUs, {free_memory() / 1e9:.1f} GB of memory free"
    yield "GPU", _gpu()
    yield "triton", why_not_triton(default_device()) or "can run here"
    yield "disk", f"{disk_usage(Path.cwd()).free / 1e9:.1f} GB free here (runs are in outputs/)"
    for extra, (purpose, modules) in EXTRAS.items():
        is_missing = any(find_spec(module) is None for module in modules)
        state = "ready"
        if is_missing:
            state = f"not installed: pip install 'flora-train[{extra}]'"
        yield extra, f"{purpose}: {state}"
    yield "hub login", _login()


def _sandbox_facts() -> Iterator[tuple[str, str]]:
    """(heading, line) of the sandbox, and of the languages whose programs run in it."""
    try:
        sandbox = open_sandbox("bubblewrap")
    except UserError as error:
        yield "sandbox", str(error.problems[0])
        return
    yield "sandbox", "bubblewrap confines programs here"
    yield "memory", _memory(sandbox)
    languages = load_languages()
    broken = preflight(languages.values(), sandbox)
    working = [key for key in languages if key not in broken]
    yield "languages", f"{len(working)} of {len(languages)} can be evaluated: {', '.join(working)}"
    for key, reason in broken.items():
        yield f"  {key}", reason


def _memory(sandbox: Sandbox) -> str:
    """The bounds on the memory of generated programs."""
    gibibytes = Limits(cpu=1).memory >> 30
    together = "and over all processes of a program together (sampled every 20 ms)"
    bounds = f"{gibibytes} GiB of data a process (kernel), {together}"
    if sandbox.filtered and deny_filter() is not None:
        return f"{bounds}; memory that sampling does not see is denied"
    return (
        f"{bounds}; this kernel or machine does not deny memory that sampling does not see (memfd, System V)"
    )


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees: everything runs on the CPU"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _login() -> str:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1: the hub is not contacted"
    if get_token():
        return "a token is here"
    return "none (needed for gated data and flora-train push): hf auth login"
