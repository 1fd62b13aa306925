"""Host storage of adapters that are not on the device: memory, pinned for a GPU, or files that the system
pages."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

import psutil
import torch
from torch import Tensor

from flora_train.config.errors import user_error
from flora_train.runtime.atomic import disk_errors


def allocate_host_rows(
    rows: int, size: int, dtype: torch.dtype, *, pinned: bool = False, folder: Path | None = None
) -> Tensor:
    """Zeros [rows, size] on the host: in memory, or in a file below `folder` (Linux).

    The file has no name: it disappears with the process, and no other process can write to it. Raises
    UserError if there is not enough free memory or disk space.
    """
    length = rows * size * dtype.itemsize
    if folder is None:
        free = free_memory()
        if length > free:
            needed, available = f"{length / 1e9:.1f} GB", f"{free / 1e9:.1f} GB"
            hint = (
                f"needs {needed} more memory for adapters, and {available} are free: disk keeps them in files"
            )
            raise user_error("paging.host", "memory", hint)
        return torch.zeros(rows, size, dtype=dtype, pin_memory=pinned)
    if not hasattr(os, "posix_fallocate") or not Path("/proc/self/fd").is_dir():
        raise user_error("paging.host", "disk", "is supported on Linux only: use memory")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            # Allocated now, so that a full disk is an error here and not a crash at a later write.
            os.posix_fallocate(file.fileno(), 0, length)
            path = f"/proc/self/fd/{file.fileno()}"
            return torch.from_file(path, shared=True, size=rows * size, dtype=dtype).view(rows, size)


def copy_to_host(tensor: Tensor, folder: Path | None = None) -> Tensor:
    """A copy of [rows, size] on the host: in memory, or in a file below `folder`. Raises UserError if the
    disk is full."""
    if folder is None:
        return tensor.detach().to("cpu", copy=True).contiguous()
    rows, size = tensor.shape
    return allocate_host_rows(rows, size, tensor.dtype, folder=folder).copy_(tensor.detach())


def free_memory() -> int:
    """Bytes that can be allocated without swapping, as far as the system reports them."""
    return int(psutil.virtual_memory().available)
