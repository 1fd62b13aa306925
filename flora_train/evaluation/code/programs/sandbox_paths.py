"""Where a program's files may lie, and what of the caller it must not see."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flora_train.config.errors import UserError, user_error
from flora_train.config.paths import CHECKOUT, IS_CHECKOUT

NEUTRAL = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders for work folders, the first that will do. TMPDIR is not among them: it may lie in somebody's home, and the source of a
mount can be read inside the sandbox."""
SYSTEM_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
SYSTEM_NAMES = frozenset(
    {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "libexec", "share", "include", "local", "games"}
)
"""Folders of /usr and /usr/local that belong to the system."""


def private_folders() -> set[Path]:
    """The caller's home, current folder and checkout, where they are a folder of their own."""
    found = {CHECKOUT} if IS_CHECKOUT else set()
    for find in (Path.home, Path.cwd):
        try:
            found.add(find())
        except (OSError, RuntimeError):  # no home, or a current folder that was removed
            continue
    return {real for path in found if (real := Path(os.path.realpath(path))) != Path("/")}


def neutral_folder() -> Path:
    """A folder whose name says nothing of the caller, in which work folders can be made and programs run. Raises UserError."""
    private = private_folders()
    for name in NEUTRAL:
        path = Path(os.path.realpath(name))
        usable = path.is_dir() and os.access(path, os.W_OK | os.X_OK) and not os.statvfs(path).f_flag & os.ST_NOEXEC
        if usable and not any(path.is_relative_to(folder) for folder in private):
            return path
    words = "none of them is a folder outside your home and checkout where files can be written and run: make /tmp one"
    raise user_error("evaluation.sandbox", ", ".join(NEUTRAL), words)


def work_folder(confined: bool) -> tempfile.TemporaryDirectory[str]:
    """A new one for one program. confined: under a sandbox, where its name must say nothing."""
    return tempfile.TemporaryDirectory(prefix="program-", dir=neutral_folder() if confined else None)


def prepared_place() -> Path | None:
    """Where folders for all programs are made; None for the system's choice, where no sandbox could have been opened anyway."""
    try:
        return neutral_folder()
    except UserError:
        return None


def hidden_below(system: Path) -> list[Path]:
    """What has to be covered in a folder of the system: the home, the current folder or the checkout that lies in it, by the
    topmost folder on the way that is not the system's own."""
    hidden: dict[Path, None] = {}
    for folder in sorted(private_folders()):
        if not folder.is_relative_to(system) or folder == system:
            continue
        path = system
        for part in folder.relative_to(system).parts:
            path /= part
            if part not in SYSTEM_NAMES:
                break
        if path.name not in SYSTEM_NAMES:
            hidden[path] = None
    return list(hidden)


def clean_path(words: Sequence[str]) -> str:
    """A search path without the caller's own: the system's, and the folders of the programs that `words` name."""
    folders = [str(Path(found).parent) for word in words if "/" not in word and (found := shutil.which(word)) is not None]
    return os.pathsep.join(dict.fromkeys([*(folder for folder in folders if folder not in SYSTEM_PATH), *SYSTEM_PATH]))


def find_program(name: str) -> str | None:
    """Of the programs on the search path, the system's own before the caller's: the path of bubblewrap can be read inside, and must
    say nothing of a home."""
    found = shutil.which(name)
    system = (f"{folder}/{name}" for folder in SYSTEM_PATH)
    return found and next((path for path in system if os.access(path, os.X_OK)), found)
