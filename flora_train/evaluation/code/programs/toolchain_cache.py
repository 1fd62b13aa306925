"""What is made once and used by every program? A folder a language, such as a precompiled header, filled in the sandbox.

It lives as long as its owner, in a folder whose name says nothing of the caller: the sandbox shows it.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from flora_train.evaluation.code.programs.sandbox_paths import prepared_place


class ToolchainCache:
    """Key -> its folder, or None where filling it failed."""

    def __init__(self) -> None:
        self._folders: dict[str, Path | None] = {}
        self._lock = Lock()

    def get(self, key: str, fill: Callable[[Path], bool]) -> Path | None:
        """The folder of `key`. The first call fills it, once, while others wait; `fill` says whether that worked."""
        with self._lock:
            if key not in self._folders:
                folder = Path(tempfile.mkdtemp(prefix="prepared-", dir=prepared_place()))
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                self._folders[key] = folder if fill(folder) else None
            return self._folders[key]
