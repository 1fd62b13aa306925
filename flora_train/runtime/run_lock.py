"""A lock on a run folder that ends with the process that holds it, however that process ends.

filelock is not used: its locks on files cannot be shared by several readers, and its ReadWriteLock needs a
database in the folder. flock gives both. Windows has no flock; there msvcrt locks the file, and readers
exclude each other, too.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import weakref
from contextlib import suppress
from pathlib import Path

from flora_train.config.errors import UserError, user_error
from flora_train.runtime.atomic import disk_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

try:
    import msvcrt
except ImportError:  # other systems
    msvcrt = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors of file systems without locks (some network file systems)."""

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
HELD_ON_WINDOWS = (errno.EACCES, errno.EDEADLK)

RETRY_SECONDS = 0.2


class RunLock:
    """A lock on `folder`/.lock, which one process may hold alone (`take`), or several together (`share`).

    The folder is created where it is missing, and removed again by `release` if nothing was written into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / ".lock"
        self.enforced = True
        """Whether the file system has locks."""
        self._descriptor: int | None = None
        self._created: list[Path] = []
        _locks.add(self)

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def take(self, wait: float = 0.0) -> None:
        """Hold the lock alone. Raises UserError if another process still holds it after `wait` seconds."""
        if self.held:
            return
        deadline, logged = time.monotonic() + wait, False
        with disk_errors(self.folder):
            self._create_folder()
            while not self._try(exclusive=True):
                if time.monotonic() >= deadline:
                    raise self._error()
                if not logged:
                    logger.info(f"waiting for another process that trains in {self.folder}")
                logged = True
                time.sleep(RETRY_SECONDS)

    def share(self) -> None:
        """Hold the lock together with other readers. Raises UserError if another process holds it alone.

        Does nothing where the folder is read-only and has no lock file: no process trains there.
        """
        if self.held or not self.folder.is_dir():
            return
        try:
            if not self._try(exclusive=False):
                raise self._error()
        except OSError as error:
            if error.errno not in (*READ_ONLY, errno.ENOENT):
                with disk_errors(self.file):
                    raise

    def release(self) -> None:
        """Release the lock. A folder that was created for it and is still empty is removed."""
        if self._descriptor is None:
            return
        if self._created:
            self._remove_empty_folder()
        _unlock(self._descriptor)
        os.close(self._descriptor)
        self._descriptor, self._created = None, []

    def close_descriptor(self) -> None:
        """In a forked process: close its copy of the descriptor, so that the lock ends with the process that
        took it.
        """
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        with suppress(OSError):
            self.close_descriptor()

    def _create_folder(self) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._created = missing[::-1]

    def _remove_empty_folder(self) -> None:
        with suppress(OSError):
            if os.listdir(self.folder) == [self.file.name]:
                self.file.unlink()
                for folder in reversed(self._created):
                    folder.rmdir()

    def _try(self, exclusive: bool) -> bool:
        descriptor = self._open()
        try:
            locked = self._lock(descriptor, exclusive)
            if locked and self._is_current(descriptor):
                self._descriptor, descriptor = descriptor, -1
                return True
        finally:
            if descriptor != -1:
                os.close(descriptor)
        if locked:  # a process that had created the folder removed the file meanwhile
            self._create_folder()
            return self._try(exclusive)
        return False

    def _open(self) -> int:
        flags = getattr(os, "O_NOFOLLOW", 0)
        try:
            return os.open(self.file, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError as error:
            if error.errno not in READ_ONLY or not self.file.exists():
                raise
            return os.open(self.file, os.O_RDONLY | flags)

    def _lock(self, descriptor: int, exclusive: bool) -> bool:
        """Whether the lock was free. A file system without locks counts as free."""
        try:
            return _try_lock(descriptor, exclusive)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        if self.enforced:
            logger.warning(f"no file locks in {self.folder}: let only one process work there")
        self.enforced = False
        return True

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.file))
        except FileNotFoundError:
            return False

    def _error(self) -> UserError:
        hint = (
            "another process trains or evaluates in it: wait until it ends, end it, or choose another folder"
        )
        return user_error("output_dir", str(self.folder), hint)


def _try_lock(descriptor: int, exclusive: bool) -> bool:
    """Whether the lock was free. Raises OSError with one of NO_LOCKS where there are no locks."""
    if fcntl is not None:
        operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
    if msvcrt is not None:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno not in HELD_ON_WINDOWS:
                raise
            return False
        return True
    raise OSError(errno.ENOLCK, "no file locks")


def _unlock(descriptor: int) -> None:
    """Release the lock even if a process that was forked just now still has a copy of the descriptor."""
    with suppress(OSError):
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        elif msvcrt is not None:
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)


_locks: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _close_all() -> None:
    for lock in list(_locks):
        lock.close_descriptor()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)
