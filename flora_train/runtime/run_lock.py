"""A lock on a run folder that the kernel holds: it ends with the process, whatever ends that."""

from __future__ import annotations

import errno
import logging
import os
import time
import weakref
from contextlib import suppress
from pathlib import Path

from flora_train.config.errors import user_error
from flora_train.runtime.atomic import disk_errors

logger = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system answers that has no locks (some network file systems)."""


class RunLock:
    """flock on `folder`/.lock. Of several processes one may hold it alone (`take`), or several together (`share`).

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
        deadline, told = time.monotonic() + wait, False
        with disk_errors(self.folder):
            self._create_folder()
            while not self._try(alone=True):
                if time.monotonic() >= deadline:
                    raise self._taken()
                if not told:
                    logger.info(f"waiting for another process that trains in {self.folder}")
                told = True
                time.sleep(0.2)

    def share(self) -> None:
        """Hold the lock together with other readers. Raises UserError if another process holds it alone. Does nothing where the folder
        cannot be written to and has no lock file: no process trains there."""
        if self.held or not self.folder.is_dir():
            return
        try:
            if not self._try(alone=False):
                raise self._taken()
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
                with disk_errors(self.file):
                    raise

    def release(self) -> None:
        """Give the lock back. A folder that was created for it and is still empty is removed."""
        if self._descriptor is None:
            return
        if self._created:
            with suppress(OSError):
                if os.listdir(self.folder) == [self.file.name]:
                    self.file.unlink()
                    for folder in reversed(self._created):
                        folder.rmdir()
        if fcntl is not None:  # a process that was forked just now may still have a copy of the descriptor
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor, self._created = None, []

    def forget(self) -> None:
        """In a forked process: close its copy of the descriptor, so that the lock ends with the process that took it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        with suppress(OSError):
            self.forget()

    def _create_folder(self) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._created = missing[::-1]

    def _try(self, alone: bool) -> bool:
        descriptor = self._open()
        try:
            locked = self._lock(descriptor, alone)
            if locked and self._is_current(descriptor):
                self._descriptor, descriptor = descriptor, -1
                return True
        finally:
            if descriptor != -1:
                os.close(descriptor)
        if locked:  # the file was removed by a process that created the folder in vain
            self._create_folder()
            return self._try(alone)
        return False

    def _open(self) -> int:
        flags = getattr(os, "O_NOFOLLOW", 0)
        try:
            return os.open(self.file, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not self.file.exists():
                raise
            return os.open(self.file, os.O_RDONLY | flags)

    def _lock(self, descriptor: int, alone: bool) -> bool:
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, "no file locks")
            fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
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

    def _taken(self) -> Exception:
        hint = (
            "another process trains or evaluates in it: wait until it ends, end it, or choose another folder"
        )
        return user_error("output_dir", str(self.folder), hint)


_locks: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_locks):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
