"""How is nothing half-written? A file is the old one, or the new one whole, and a full disk is a clear error."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flora_train.config.errors import fail


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` a temporary neighbour, then rename: the file is the old one, or the new one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The new name, too, is there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class disk_errors:
    """Turn "no space left" and "not allowed" into a UserError that names the file and the space there is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = isinstance(error, OSError) and error.errno in codes
        # safetensors passes on the system's words, in an error type of its own
        full = full or any(os.strerror(code) in str(error) for code in codes)
        if full:
            place = next(parent for parent in (self.path, *self.path.parents) if parent.exists())
            free = shutil.disk_usage(place).free / 1e6
            raise fail(
                str(self.path), None, f"the disk is full ({free:.1f} MB free): what was there is kept; make room and run again"
            ) from error
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
            raise fail(str(self.path), None, f"may not be written ({error.strerror}): choose another place") from error
