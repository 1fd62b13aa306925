"""ToolchainCache: folders with what a language compiles once for all its programs, such as a precompiled
header.

They are visible in the sandbox, so their names contain nothing about the user.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from flora_train.evaluation.code.programs.sandbox_paths import shared_parent


class ToolchainCache:
    """Language key -> folder, or None if filling it failed. The folders are deleted with the object."""

    def __init__(self) -> None:
        self._folders: dict[str, Path | None] = {}
        self._lock = Lock()

    def get(self, key: str, fill: Callable[[Path], bool]) -> Path | None:
        """The folder of `key`.

        The first call fills it while others wait; `fill` returns whether it succeeded.
        """
        with self._lock:
            if key not in self._folders:
                folder = Path(tempfile.mkdtemp(prefix="prepared-", dir=shared_parent()))
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                self._folders[key] = folder if fill(folder) else None
            return self._folders[key]
