"""Where, and with what, was something measured? Versions, commit, machine and time."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora_train.config.load import PROJECT_ROOT


def environment() -> dict[str, Any]:
    """Versions, commit and machine, kept with every result."""
    packages = ("torch", "triton", "transformers", "accelerate", "peft", "datasets", "numpy")
    return {
        "flora_train": _version("flora-train") or "not installed",
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name))},
        "machine": machine(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
    }


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def available_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions_line(facts: dict[str, Any]) -> str:
    """Python and packages of `environment()`, as a person reads them."""
    return f"Python {facts['python']}, " + ", ".join(
        f"{name} {version}" for name, version in facts["packages"].items()
    )


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
    """Bytes: the device's peak allocation, or the process's largest resident size on CPU; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def dtype_of(model: nn.Module) -> str:
    """What a model's weights are, as `model.dtype` spells it."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")
