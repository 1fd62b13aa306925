"""Versions, commit, machine and time of a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import psutil
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from flora_train.config.load import PROJECT_ROOT
from flora_train.runtime.json_types import Count, Text


class Machine(BaseModel):
    """The machine of the main process."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    processor: Text | None = None
    cpus: Count | None = None
    threads: Count | None = None
    gpu: Text | None = None
    system: Text | None = None


class Environment(BaseModel):
    """Versions, commit and machine. What was not recorded is None or empty."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    flora_train: Text | None = None
    """Version of the package."""
    commit: Text | None = None
    python: Text | None = None
    packages: dict[Text, Text] = {}
    machine: Machine = Machine()
    command: Text | None = None


def environment() -> Environment:
    """Versions, commit and machine, kept with every result."""
    packages = ("torch", "triton", "transformers", "accelerate", "peft", "datasets", "numpy")
    versions = {name: _version(name) for name in packages}
    return Environment(
        flora_train=_version("flora-train") or "not installed",
        commit=_commit(),
        python=platform.python_version(),
        packages={name: version for name, version in versions.items() if version is not None},
        machine=machine(),
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def machine() -> Machine:
    """The machine that results were measured on."""
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return Machine(
        processor=_processor(),
        cpus=os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=gpu,
        system=platform.system(),
    )


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def available_cpus() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions_line(environment: Environment) -> str:
    """Python and packages of `environment()`, in one line of text."""
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    return f"Python {environment.python}, {packages}"


def now() -> str:
    """ISO 8601, with the offset to UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    if not (PROJECT_ROOT / ".git").exists():  # a wheel may be installed inside another project's tree
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=10
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def peak_memory(device: torch.device) -> int:
    """Bytes: the peak allocation on a GPU, or the largest resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def dtype_of(model: nn.Module) -> str:
    """The dtype of a model's weights, as in `model.dtype`."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def count_parameters(model: nn.Module) -> int:
    """The number of a model's parameters. transformers' own count knows how 4-bit weights are packed."""
    counted = getattr(model, "num_parameters", None)
    if callable(counted):
        return int(counted())
    return sum(parameter.numel() for parameter in model.parameters())
