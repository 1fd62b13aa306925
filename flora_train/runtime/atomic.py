"""How is nothing half-written? A file is the old one, or the new one whole, and a full disk is a clear error."""

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


def write_atomically(path: Path, write: Write, new: bool = False) -> None:
    """`write` a temporary neighbour, then rename: the file is the old one, or the new one whole.

    new: the file must not exist, not even if another process has made it meanwhile. Raises UserError if it cannot be written.
    """
    with disk_errors(path), _written(path, write) as temporary:
        if new:
            _name_new(temporary, path)
        else:
            temporary.replace(path)
        _sync_folder(path.parent)


@contextmanager
def _written(path: Path, write: Write) -> Iterator[Path]:
    """A temporary neighbour of `path` with its content on the disk; removed at the end if it is still there."""
    name = path.name if len(os.fsencode(path.name)) < 230 else sha256(os.fsencode(path.name)).hexdigest()
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("r+b") as file:  # Windows syncs what may be written
                os.fsync(file.fileno())
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _name_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise user_error(str(path), None, "exists already: choose another, or delete it") from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise user_error(str(path), None, "exists already: choose another, or delete it") from None
        temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    """The new name, too, is there after a power cut."""
    if os.name == "nt":  # has no such thing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Raises UserError if nothing can be written into a folder that exists, or is to be made. Leaves nothing."""
    there = next((place for place in (folder, *folder.absolute().parents) if os.path.lexists(place)), folder)
    with disk_errors(folder), tempfile.TemporaryFile(dir=there):
        pass


def real_path(path: Path) -> Path:
    """Absolute, its links followed. Unlike Path.resolve it also takes links that lead in a circle."""
    return Path(os.path.realpath(path))


def user_cache(part: str) -> Path:
    """The folder for one kind of cached files: below XDG_CACHE_HOME, ~/.cache, or where a user has no home, the system's temporary folder."""
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
"""What a user does about an error of the system."""
ELSEWHERE = "choose another place"


class disk_errors:
    """A context in which files are written: turn the system's errors into a UserError that names the file and a hint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        code = _code(error)
        if error is None or code is None:
            return
        if code in FULL:
            room = f" ({free:.1f} MB free)" if (free := _free_megabytes(self.path)) is not None else ""
            raise user_error(
                str(self.path),
                None,
                f"the disk is full{room}: what was there is kept; make room and run again",
            ) from error
        raise user_error(
            str(self.path), None, f"may not be written ({os.strerror(code)}): {HINTS.get(code, ELSEWHERE)}"
        ) from error


def _code(error: BaseException | None) -> int | None:
    """The number of the system's error; None if the error is another one."""
    if isinstance(error, ConnectionError):
        return None
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    # safetensors passes on the system's number in an error type of its own
    passed_on = (
        re.search(r"os error (\d+)", str(error))
        if error is not None and not isinstance(error, UserError)
        else None
    )
    return int(passed_on[1]) if passed_on else None


def _free_megabytes(path: Path) -> float | None:
    for parent in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(parent).free / 1e6
    return None
