"""flora-train doctor, without a recipe: what is this machine ready for, and what would it take to be ready for the rest?"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage

import torch
from rich.console import Console

from flora_train.adapters.host_memory import free_memory
from flora_train.config.errors import UserError
from flora_train.config.terminal_text import shown
from flora_train.evaluation.code.programs.execute import preflight
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.programs.sandbox import Limits, Sandbox, open_sandbox
from flora_train.evaluation.code.programs.system_calls import deny_filter
from flora_train.kernels.backend import why_not_triton
from flora_train.training.environment import available_cpus, environment, versions_line

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
    yield "triton", why_not_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")) or "can run here"
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
