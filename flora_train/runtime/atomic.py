"""Atomic writes of files and folders, and one clear error for every failure of a disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from flora_train.config.errors import UserError, user_error

Write = Callable[[Path], Any]

LONGEST_NAME = 230
"""Bytes of a file name beyond which the temporary file is named by a hash: its name is longer."""

EXISTS = "exists already: choose another, or delete it"


def write_atomically(path: Path, write: Write, new: bool = False) -> None:
    """`write` a temporary file beside `path`, then rename it: after a kill, the old file is there or the new
    one, whole.

    new: the file must not exist, even if another process creates it meanwhile. Raises UserError if it cannot
    be written.
    """
    with disk_errors(path), _temporary_file(path, write) as temporary:
        if new:
            _rename_to_new(temporary, path)
        else:
            temporary.replace(path)
        _sync_folder(path.parent)


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, to be filled and then renamed to it. It is removed at the end if it is
    still there. Raises UserError if it cannot be written.
    """
    temporary = temporary_name(folder)
    with disk_errors(folder):
        temporary.mkdir(parents=True)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _temporary_file(path: Path, write: Write) -> Iterator[Path]:
    """A temporary file beside `path` with its content on disk; removed at the end if it is still there."""
    temporary = temporary_name(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("r+b") as file:  # Windows cannot sync what is open for reading only
                os.fsync(file.fileno())
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A hidden neighbour of this process. Manifest recognises the form of the name."""
    name, encoded = path.name, os.fsencode(path.name)
    if len(encoded) >= LONGEST_NAME:
        name = sha256(encoded).hexdigest()
    return path.with_name(f".{name}.{os.getpid()}.tmp")


def _rename_to_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise user_error(str(path), None, EXISTS) from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise user_error(str(path), None, EXISTS) from None
        temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    """Flush the folder, so that the new name survives a power cut."""
    if os.name == "nt":  # cannot sync folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Raises UserError if nothing can be written into a folder that exists, or is to be created. Leaves no
    file.
    """
    candidates = (folder, *folder.absolute().parents)
    existing = next((candidate for candidate in candidates if os.path.lexists(candidate)), folder)
    with disk_errors(folder), tempfile.TemporaryFile(dir=existing):
        pass


def real_path(path: Path) -> Path:
    """The absolute path with links followed. Unlike Path.resolve, it accepts circular links."""
    return Path(os.path.realpath(path))


def user_cache(part: str) -> Path:
    """The folder of one kind of cached files: below XDG_CACHE_HOME, ~/.cache or, where a user has no home,
    the system's temporary folder.
    """
    above = os.environ.get("XDG_CACHE_HOME")
    if not above:
        try:
            above = str(Path.home() / ".cache")
        except RuntimeError:
            above = tempfile.gettempdir()
    return Path(above) / "flora_train" / part


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HINTS = {
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.EROFS: "choose a place that can be written to",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.ENOTDIR: "a file is in the way of a folder: choose another place",
    errno.EISDIR: "a folder is in the way of the file: choose another place",
    errno.EEXIST: "something of this name is in the way: choose another place",
    errno.ENOTEMPTY: "a folder that is not empty is in the way: choose another place",
    errno.ELOOP: "links lead in a circle there, or a link is in the way: choose another place",
    errno.EIO: "the disk reports an error: check it, or choose another place",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
}
"""Error number of the system -> what a user can do about it."""
ELSEWHERE = "choose another place"


class disk_errors:
    """A context that writes files: it turns the system's errors into a UserError with the file and a hint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        code = _code(error)
        if error is None or code is None:
            return
        if code not in FULL:
            hint = f"may not be written ({os.strerror(code)}): {HINTS.get(code, ELSEWHERE)}"
            raise user_error(str(self.path), None, hint) from error
        free = _free_megabytes(self.path)
        room = "" if free is None else f" ({free:.1f} MB free)"
        hint = f"the disk is full{room}: existing files are kept; free some space and run again"
        raise user_error(str(self.path), None, hint) from error


def _code(error: BaseException | None) -> int | None:
    """The system's error number; None for other errors."""
    if error is None or isinstance(error, (ConnectionError, UserError)):
        return None
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    # safetensors reports the system's error number in an error type of its own
    number = re.search(r"os error (\d+)", str(error))
    return int(number[1]) if number else None


def _free_megabytes(path: Path) -> float | None:
    for parent in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(parent).free / 1e6
    return None
