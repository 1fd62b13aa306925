"""Folders for generated programs, and paths of the user that must stay hidden from them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flora_train.config.errors import UserError, user_error
from flora_train.config.paths import CHECKOUT, IS_CHECKOUT

NEUTRAL = ("/tmp", "/var/tmp", "/dev/shm")
"""Candidates for the parent of work folders, in order of preference.

TMPDIR is not used: it may be inside a home folder, and the source of a mount can be read inside the sandbox.
"""
SYSTEM_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
SYSTEM_NAMES = frozenset(
    {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "libexec", "share", "include", "local", "games"}
)
"""Folders of /usr and /usr/local that belong to the system."""


def private_folders() -> set[Path]:
    """The user's home, the current folder and the checkout, without the root folder."""
    folders = {CHECKOUT} if IS_CHECKOUT else set()
    for find in (Path.home, Path.cwd):
        try:
            folders.add(find())
        except (OSError, RuntimeError):  # no home, or the current folder was deleted
            continue
    return {Path(os.path.realpath(folder)) for folder in folders} - {Path("/")}


def neutral_folder() -> Path:
    """A folder for work folders whose path contains nothing about the user.

    Raises UserError if there is none.
    """
    private = private_folders()
    for name in NEUTRAL:
        path = Path(os.path.realpath(name))
        if _is_usable(path) and not any(path.is_relative_to(folder) for folder in private):
            return path
    hint = (
        "one of these must be a folder outside your home and checkout where files can be written and executed"
    )
    raise user_error("evaluation.sandbox", ", ".join(NEUTRAL), hint)


def work_folder(confined: bool) -> tempfile.TemporaryDirectory[str]:
    """A new temporary folder for one program. confined: for a sandbox, where its path must be neutral."""
    parent = neutral_folder() if confined else None
    return tempfile.TemporaryDirectory(prefix="program-", dir=parent)


def shared_parent() -> Path | None:
    """Parent of the folders shared by all programs; None for the system's default, if no sandbox could be
    opened anyway.
    """
    try:
        return neutral_folder()
    except UserError:
        return None


def hidden_below(system: Path) -> list[Path]:
    """Folders inside a system folder that the sandbox must hide because they contain one of
    `private_folders`.

    For each, this is the topmost folder on the path that is not part of the system.
    """
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


def clean_path(argv: Sequence[str]) -> str:
    """A search path of the system's folders and those of the programs named in a command."""
    programs = [shutil.which(word) for word in argv if "/" not in word]
    folders = [str(Path(program).parent) for program in programs if program is not None]
    additional = [folder for folder in folders if folder not in SYSTEM_PATH]
    return os.pathsep.join(dict.fromkeys([*additional, *SYSTEM_PATH]))


def find_program(name: str) -> str | None:
    """The path of an installed program, preferably in the system's folders; None if it is not on the search
    path.

    The path of bubblewrap can be read inside the sandbox, and should not contain a home folder.
    """
    on_path = shutil.which(name)
    if on_path is None:
        return None
    system_paths = (f"{folder}/{name}" for folder in SYSTEM_PATH)
    return next((path for path in system_paths if os.access(path, os.X_OK)), on_path)


def _is_usable(path: Path) -> bool:
    """Whether files can be written and executed in a folder."""
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        return False
    return not os.statvfs(path).f_flag & os.ST_NOEXEC
