"""Where on the host do adapters live that are not on the device? In memory, pinned for a GPU, or in files that the system pages."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

from flora_train.config.errors import user_error
from flora_train.runtime.atomic import disk_errors


def allocate_host_rows(rows: int, size: int, dtype: torch.dtype, pinned: bool, folder: Path | None) -> Tensor:
    """Zeros [rows, size] on the host; in a file if a folder is given (Linux). The file has no name: no kill leaves it behind, and nobody
    else can write to it. Raises UserError if there is not enough memory, or room on the disk."""
    length = rows * size * dtype.itemsize
    if folder is None:
        if length > (free := free_memory()):
            hint = f"would keep {length / 1e9:.1f} GB more of adapters in memory, where {free / 1e9:.1f} GB are free: disk keeps them in files"
            raise user_error("paging.host", "memory", hint)
        return torch.zeros(rows, size, dtype=dtype, pin_memory=pinned)
    if not hasattr(os, "posix_fallocate") or not Path("/proc/self/fd").is_dir():
        raise user_error("paging.host", "disk", "keeps adapters in files on Linux only: leave it at memory")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:  # has no name from the beginning
            os.posix_fallocate(file.fileno(), 0, length)  # a full disk is an error now, not a crash at some later write
            here = f"/proc/self/fd/{file.fileno()}"
            return torch.from_file(here, shared=True, size=rows * size, dtype=dtype).view(rows, size)


def copy_to_host(tensor: Tensor, folder: Path | None = None) -> Tensor:
    """A copy of [rows, size] on the host; in a file if a folder is given, whose pages the system writes out where memory is short: UserError
    says where the disk is full."""
    if folder is None:
        return tensor.detach().to("cpu", copy=True).contiguous()
    rows, size = tensor.shape
    return allocate_host_rows(rows, size, tensor.dtype, False, folder).copy_(tensor.detach())


def free_memory() -> int:
    """Bytes that can be had without swapping, as far as the system says."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            facts = dict(line.split(":") for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # macOS, Windows
        import psutil  # of accelerate's

        return int(psutil.virtual_memory().available)
