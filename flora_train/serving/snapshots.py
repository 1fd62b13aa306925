"""Private copies of adapter folders, named by their content, so that later changes of a folder reach no
running request."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from flora_train.adapters.peft_config import CONFIG, MAX_CONFIG_BYTES
from flora_train.adapters.peft_equivalents import PeftAdapter
from flora_train.adapters.peft_tensors import WEIGHTS
from flora_train.config.errors import Problem, UserError, user_error
from flora_train.runtime.atomic import user_cache
from flora_train.runtime.manifest import BASE_RECORD
from flora_train.serving.adapter_files import KEY, MOST_BYTES, LoraFolder, check_files, read_adapter

try:
    import fcntl
except ImportError:  # Windows, where vLLM does not run
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "FLORA_TRAIN_SNAPSHOTS"
"""Environment variable with the folder in which servers keep their copies. Processes on several machines need
one that all of them see."""
LIMITS = {CONFIG: MAX_CONFIG_BYTES, BASE_RECORD: MAX_CONFIG_BYTES, **dict.fromkeys(WEIGHTS, MOST_BYTES)}
"""Files that are copied -> largest size."""
ATTEMPTS, PAUSE = 5, 0.2
"""How often, and after how many seconds, a folder is read again that changed while it was copied."""
PART = 2**20
"""Bytes that are copied at once."""
LOCK = "lock"
NAME = re.compile(r"\d+-[a-z0-9_]{8}")
"""Names of the folders of servers."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of an adapter's folder."""

    folder: Path
    digest: str
    """SHA-256 of the content, in hexadecimal."""

    @property
    def int_id(self) -> int:
        """A positive number of 62 bits, equal for equal contents, as vLLM identifies adapters."""
        return int(self.digest[:16], 16) % 2**62 + 2**20


class ChangedError(Exception):
    """The folder changed while it was copied."""


class SnapshotStore:
    """The copies of one server, deleted when it ends."""

    def __init__(self, above: Path | None = None) -> None:
        """above: the folder that holds the folders of all servers."""
        above = above or _default_folder()
        try:
            self.root, lock = _new_root(above)
        except OSError as error:
            hint = f"no copies of adapters can be kept there ({error.strerror}): choose another folder"
            raise user_error(FOLDER_VARIABLE, str(above), hint) from error
        self.close = weakref.finalize(self, _close, self.root, lock, os.getpid())
        """Deletes the copies. Called when the process or this object ends."""
        self._guard = threading.Lock()
        self._last_taken: dict[Path, float] = {}

    def take(self, source: Path, shown: str | None = None, *, salt: str = "") -> Snapshot:
        """Copy and check an adapter's folder.

        shown: what an error names instead of the folder; salt: distinguishes equal contents that are loaded
        in different ways. Raises UserError for a folder that holds no adapter which can be served exactly, or
        that does not stop changing.
        """
        shown = shown or str(source)
        with self._temporary(shown) as temporary:
            digest = _copied(source, temporary, shown, salt=salt)
            adapter = read_adapter(temporary, shown)
            if isinstance(adapter, LoraFolder) and adapter.converted is not None:
                _write(adapter.converted, temporary)
            folder = self.root / digest[:32]
            with self._guard:
                with suppress(OSError):  # a copy of the same content may be there
                    temporary.rename(folder)
                if not folder.is_dir():
                    raise FileNotFoundError(errno.ENOENT, "its folder was deleted")
                self._last_taken[folder] = time.monotonic()
        return Snapshot(folder, digest)

    def folders(self) -> list[Path]:
        """The folders of all copies."""
        return list(self._last_taken)

    def drop(self, folder: Path, *, age: float = 0.0) -> None:
        """Delete a copy that no request needs, unless it was taken again in the last `age` seconds."""
        with self._guard:
            if time.monotonic() - self._last_taken[folder] >= age:
                del self._last_taken[folder]
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _temporary(self, shown: str) -> Iterator[Path]:
        temporary = None
        try:
            temporary = Path(tempfile.mkdtemp(prefix="new-", dir=self.root))
            yield temporary
        except OSError as error:
            hint = f"cannot be copied to {self.root} ({error.strerror}): free space there, or set "
            raise user_error(KEY, shown, f"{hint}{FOLDER_VARIABLE} to another folder") from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def _copied(source: Path, folder: Path, shown: str, *, salt: str) -> str:
    """Copy the adapter's files and return the digest of their contents."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE)
        try:
            return _copied_once(source, folder, salt)
        except ChangedError:
            logger.info("%s changes while it is copied", shown)
        except UserError as error:
            raise UserError(*(Problem(KEY, shown, problem.hint) for problem in error.problems)) from error
    hint = "changes while it is read: load it when it is complete, or write it elsewhere and rename it"
    raise user_error(KEY, shown, hint)


def _copied_once(source: Path, folder: Path, salt: str) -> str:
    check_files(source)
    before = stamps_of(source)
    digest = hashlib.sha256(salt.encode())
    for name in before:
        digest.update(f"\0{name}\0".encode())
        digest.update(_copy(source / name, folder / name))
    if stamps_of(source) != before:
        raise ChangedError
    return digest.hexdigest()


def stamps_of(source: Path) -> dict[str, tuple[int, ...]]:
    """File of an adapter -> what changes when the file does. Files that are missing are left out."""
    stamps: dict[str, tuple[int, ...]] = {}
    for name in LIMITS:
        if name == WEIGHTS[1] and WEIGHTS[0] in stamps:
            continue
        try:
            status = (source / name).stat()
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(status.st_mode):
            stamps[name] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return stamps


def _copy(source: Path, target: Path) -> bytes:
    """Copy a file and return the SHA-256 of its content."""
    digest = hashlib.sha256()
    size = 0
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
    except FileNotFoundError as error:
        raise ChangedError from error
    except OSError as error:
        raise user_error(KEY, None, f"cannot be read: {source.name} ({error.strerror})") from error
    with open(descriptor, "rb") as content, target.open("wb") as copy:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ChangedError
        while part := content.read(PART):
            size += len(part)
            if size > LIMITS[source.name]:
                hint = f"is no adapter: {source.name} is larger than {LIMITS[source.name]:,} bytes"
                raise user_error(KEY, None, hint)
            digest.update(part)
            copy.write(part)
    return digest.digest()


def _write(adapter: PeftAdapter, folder: Path) -> None:
    """Replace the files of the adapter in `folder`."""
    config, tensors = adapter
    for name in WEIGHTS:
        (folder / name).unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS[0])
    (folder / CONFIG).write_text(json.dumps(dict(config.options), indent=2) + "\n", encoding="utf-8")


def _default_folder() -> Path:
    """The chosen folder, or one in the user's cache, or one for temporary files."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    cache = user_cache("serving")
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.access(cache, os.W_OK):
        return cache
    return Path(tempfile.gettempdir()) / f"flora_train-serving-{os.getuid()}"


def _new_root(above: Path) -> tuple[Path, int]:
    """A new folder for one server's copies, and the descriptor that locks it."""
    above.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(above):
        _delete_abandoned(above)
        root = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=above))
        lock = os.open(root / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return root, lock


@contextmanager
def _locked(above: Path) -> Iterator[None]:
    """A context in which no other server creates or deletes a folder of a server."""
    descriptor = os.open(above / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _delete_abandoned(above: Path) -> None:
    """Delete the folders of servers that were killed: nobody holds their lock."""
    for root in above.iterdir():
        if not root.is_dir() or NAME.fullmatch(root.name) is None:
            continue
        try:
            descriptor = os.open(root / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(root, ignore_errors=True)
        except OSError:
            logger.debug("%s belongs to a server that runs", root)
        finally:
            os.close(descriptor)


def _close(root: Path, lock: int, process: int) -> None:
    if os.getpid() == process:  # a forked child shares the copies of its parent
        shutil.rmtree(root, ignore_errors=True)
        os.close(lock)
