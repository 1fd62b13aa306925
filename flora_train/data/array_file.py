"""Files of named arrays, which are written piece by piece and memory-mapped when they are read."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import psutil
from numpy.typing import DTypeLike, NDArray

from flora_train.config.errors import UserError
from flora_train.config.json_format import JsonObject, parse_object
from flora_train.runtime.atomic import disk_errors, temporary_name

MAGIC = b"flora-arrays 1\n\0"
TRAILER = struct.Struct("<QI16s")
"""At the end of a file: size of the description before it, its CRC-32, and MAGIC."""
ALIGNMENT = 64
"""Arrays begin at multiples of this."""
COPIED = 1 << 20
"""Bytes that are copied or checked at once."""
IN_MEMORY = 8 << 20
"""Bytes of all arrays up to which nothing is written before the end."""
SMALL = 1 << 18
"""Bytes of a file up to which it is read into memory instead of being mapped."""
ABANDONED = 3600.0
"""Seconds after which a temporary file that does not grow is deleted."""
KINDS = "biufU"
"""Kinds of numbers and text, in numpy's letters, that arrays may have."""

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


class ArrayWriter:
    """Arrays that grow at their end, and are published under `path` as a whole. Use it as a context, at whose
    end nothing unfinished remains.

    Small arrays stay in memory until the end, so that a disk that cannot be written is only a warning.
    Large ones are written while they grow, the first of `types` to its final place. path: None for arrays
    that stay in memory; types: array -> type of its items, and the shape of an item.
    """

    def __init__(self, path: Path | None, types: Mapping[str, tuple[DTypeLike, tuple[int, ...]]]) -> None:
        self.path = path
        self._columns = {name: _Column(np.dtype(dtype), shape) for name, (dtype, shape) in types.items()}
        self._first = next(iter(types))
        self._temporary: Path | None = None
        self._folder: Path | None = None
        """A folder of its own, where `path` cannot be written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for column in self._columns.values():
            column.close()
        if self._temporary is not None:
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(column.size for column in self._columns.values())

    def append(self, **arrays: NDArray[Any]) -> None:
        """Add these items to the arrays. Raises UserError if the disk is full."""
        for name, items in arrays.items():
            self._columns[name].append(items)
        if self.path is None or self._temporary is not None:
            return
        if self.size > IN_MEMORY:
            self._begin_file()

    def finish(self, facts: JsonObject, **arrays: NDArray[Any]) -> Arrays:
        """The arrays, and further `arrays`: published with `facts` and memory-mapped, or in memory if they
        are small and cannot be written."""
        for name, items in arrays.items():
            column = self._columns[name] = _Column(items.dtype, items.shape[1:])
            column.append(items)
            if self._temporary is not None:
                self._to_temporary_file(column)
        if self.path is None:
            return self._in_memory()
        if self._temporary is not None:
            return self.publish(facts)
        in_memory = self._in_memory()
        try:
            return self.publish(facts)
        except UserError as error:  # a cache that cannot be written costs time, not the run
            logger.warning(f"tokens are not cached: {error}")
            return in_memory

    def _in_memory(self) -> Arrays:
        return {name: column.array() for name, column in self._columns.items()}

    def _begin_file(self, may_be_elsewhere: bool = True) -> None:
        """Move the first array to the final file, and the others to files without a name."""
        assert self.path is not None
        try:
            with disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                for stale in self.path.parent.glob(f".*{self.path.suffix}.*.tmp"):
                    _remove_if_abandoned(stale)
                self._temporary = temporary_name(self.path)
                first = self._temporary.open("w+b")
        except UserError as error:
            self._temporary = None
            if not may_be_elsewhere:
                raise
            logger.warning(f"tokens are not cached: {error}")
            self._folder = Path(tempfile.mkdtemp(prefix="flora_train_tokens_"))
            self.path = self._temporary = self._folder / self.path.name
            first = self._temporary.open("w+b")
        with disk_errors(self.path):
            first.write(MAGIC.ljust(ALIGNMENT, b"\0"))
            self._columns[self._first].move_to(first, self.path)
            for name, column in self._columns.items():
                if name != self._first:
                    self._to_temporary_file(column)

    def _to_temporary_file(self, column: _Column) -> None:
        assert self.path is not None
        with disk_errors(self.path):
            file = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
            column.move_to(file, self.path)

    def publish(self, facts: JsonObject) -> Arrays:
        """Rename the file to its path. Returns the arrays, memory-mapped. Raises UserError if it cannot be
        written."""
        if self._temporary is None:
            self._begin_file(may_be_elsewhere=False)
        assert self.path is not None
        assert self._temporary is not None
        with disk_errors(self.path):
            file = self._columns[self._first].file
            assert file is not None
            described = {}
            for name, column in self._columns.items():
                begin = ALIGNMENT
                if name != self._first:
                    begin = _pad(file)
                    column.copy_to(file)
                described[name] = column.description(begin)
            description = json.dumps({"arrays": described, "facts": facts}).encode()
            file.write(description)
            file.write(TRAILER.pack(len(description), zlib.crc32(description), MAGIC))
            file.flush()
            os.fsync(file.fileno())
            if self._temporary != self.path:
                self._temporary.replace(self.path)
        arrays, _ = load_arrays(self.path, check=False)
        return arrays


class _Column:
    """One array: in memory, or in a file from some position on."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self.items, self.size, self.crc = 0, 0, 0
        self.file: IO[bytes] | None = None
        self.path = Path()
        self._parts: list[NDArray[Any]] = []

    def append(self, items: NDArray[Any]) -> None:
        part = np.ascontiguousarray(items, dtype=self.dtype)
        self.items += len(part)
        self.size += part.nbytes
        if self.file is None:
            self._parts.append(part)
            return
        with disk_errors(self.path):
            self._write(part)

    def _write(self, part: NDArray[Any]) -> None:
        assert self.file is not None
        content: Any = part.reshape(-1).view(np.uint8)
        self.crc = zlib.crc32(content, self.crc)
        self.file.write(content)

    def move_to(self, file: IO[bytes], path: Path) -> None:
        """Write what is in memory at the end of a file, and all that follows. path: for errors."""
        self.file, self.path = file, path
        parts, self._parts = self._parts, []
        for part in parts:
            self._write(part)

    def copy_to(self, file: IO[bytes]) -> None:
        assert self.file is not None
        self.file.seek(0)
        shutil.copyfileobj(self.file, file, COPIED)

    def array(self) -> NDArray[Any]:
        """The array, while it is in memory."""
        return np.concatenate([np.empty((0, *self.shape), dtype=self.dtype), *self._parts])

    def description(self, begin: int) -> JsonObject:
        shape = [self.items, *self.shape]
        return {"dtype": self.dtype.str, "shape": shape, "begin": begin, "crc": self.crc}

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # a full disk, which was reported
                self.file.close()


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], facts: JsonObject) -> None:
    """Write a file of arrays atomically. Raises UserError if it cannot be written."""
    types = {name: (array.dtype, array.shape[1:]) for name, array in arrays.items()}
    with ArrayWriter(path, types) as writer:
        writer.append(**arrays)
        writer.publish(facts)


def load_arrays(path: Path, *, check: bool = True) -> tuple[Arrays, Mapping[str, Any]]:
    """(arrays, facts) of a file. The arrays cannot be written; those of a large file are memory-mapped.

    check: compare their contents with the checksums. Raises OSError or ValueError for a file that is missing,
    damaged, or something else.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - TRAILER.size))
        trailer = file.read()
        if len(trailer) < TRAILER.size or not trailer.endswith(MAGIC):
            raise ValueError("not a file of arrays, or cut off")
        length, crc, _ = TRAILER.unpack(trailer)
        end = size - TRAILER.size - length
        if end < 0:
            raise ValueError("the description is damaged")
        file.seek(end)
        description = file.read(length)
        if zlib.crc32(description) != crc:
            raise ValueError("the description is damaged")
        content: Any = parse_object(description)
        for array in content["arrays"].values():
            if check and _checksum(file, array["begin"], _bytes_of(array)) != array["crc"]:
                raise ValueError("an array is damaged")
        file.seek(0)
        whole = _content(file, size)
    return {name: _view(whole, array) for name, array in content["arrays"].items()}, content["facts"]


def _bytes_of(array: Mapping[str, Any]) -> int:
    return int(np.dtype(array["dtype"]).itemsize * np.prod(array["shape"], dtype=np.int64))


def _checksum(file: IO[bytes], begin: int, size: int) -> int:
    file.seek(begin)
    crc = 0
    while size > 0 and (content := file.read(min(size, COPIED))):
        crc = zlib.crc32(content, crc)
        size -= len(content)
    return crc


def _content(file: IO[bytes], size: int) -> NDArray[np.uint8]:
    """The bytes of a file: in memory if they are few, else mapped."""
    if size <= SMALL:
        return np.frombuffer(file.read(), dtype=np.uint8)
    try:
        mapped: NDArray[np.uint8] = np.memmap(file, dtype=np.uint8, mode="r")
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        _allow_more_files()  # a mapping keeps its file open
        mapped = np.memmap(file, dtype=np.uint8, mode="r")
    return np.asarray(mapped)


def _allow_more_files() -> None:
    """Raise the number of open files that this process may have to what the system allows it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _view(whole: NDArray[np.uint8], array: Mapping[str, Any]) -> NDArray[Any]:
    """One array of a file."""
    dtype, begin = np.dtype(array["dtype"]), int(array["begin"])
    if dtype.kind not in KINDS:
        raise ValueError(f"arrays of type {dtype} are not expected")
    content = whole[begin : begin + _bytes_of(array)]
    return content.view(dtype).reshape(array["shape"])


def blocks(array: NDArray[Any], items: int = 1 << 20) -> Iterator[NDArray[Any]]:
    """The parts of an array, so that not all of it is copied at once."""
    for begin in range(0, len(array), items):
        yield array[begin : begin + items]


def _pad(file: IO[bytes]) -> int:
    """Write zeros up to the next multiple of ALIGNMENT. Returns the position."""
    file.seek(0, os.SEEK_END)
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    return file.tell()


def _remove_if_abandoned(temporary: Path) -> None:
    """Delete the temporary file of a process that no longer runs."""
    process = temporary.name.removesuffix(".tmp").rpartition(".")[2]
    with suppress(OSError, ValueError):
        # another machine may write into the same folder
        is_old = time.time() - temporary.stat().st_mtime > ABANDONED
        if is_old and not psutil.pid_exists(int(process)):
            temporary.unlink()
