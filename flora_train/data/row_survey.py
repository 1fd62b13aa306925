"""What is known of the rows of a source after they were read once: columns, number, and a digest of each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
from numpy.typing import NDArray

from flora_train.data.documents import LocatedRow, RowsOutline
from flora_train.runtime.progress import ProgressBar

DIGEST = 16
"""Bytes of a row's digest."""
SHOWN_AFTER = 0.5
"""Seconds of reading after which its progress is shown."""
CHECKED_EVERY = 256
"""Rows after which the time is looked at."""


@dataclass(frozen=True)
class Survey:
    """The rows of a source, without their contents."""

    outline: RowsOutline
    digests: NDArray[np.uint8]
    """uint8 [n, DIGEST], memory-mapped."""

    def __len__(self) -> int:
        return len(self.digests)

    def content_hash(self, setting: Sequence[object], rows: NDArray[np.int64]) -> str:
        """SHA-256 of a setting (as JSON), and of these rows in their order."""
        digest = sha256(json.dumps(setting).encode())
        for begin in range(0, len(rows), 1 << 16):
            digest.update(self.digests[rows[begin : begin + (1 << 16)]].tobytes())
        return digest.hexdigest()


def row_digest(row: LocatedRow) -> bytes:
    """A digest of a row's cells."""
    content = json.dumps(row.cells, sort_keys=True, default=repr)
    return blake2b(content.encode(), digest_size=DIGEST).digest()


def survey_rows(rows: Iterable[LocatedRow], name: str, folder: Path) -> Survey:
    """Read all rows once.

    name: of the split, for its progress; folder: where a temporary file may be. Raises UserError for rows
    that cannot be read.
    """
    columns: dict[str, None] = {}
    first: LocatedRow | None = None
    count = 0
    with _temporary_file(folder) as file:
        for row in with_progress(rows, name):
            count += 1
            columns |= dict.fromkeys(map(str, row.cells))
            first = first or row
            file.write(row_digest(row))
        file.flush()
        digests = np.empty((0, DIGEST), dtype=np.uint8)
        if count:
            digests = np.asarray(np.memmap(file, dtype=np.uint8, mode="r", shape=(count, DIGEST)))
    return Survey(RowsOutline(tuple(columns), first), digests)


def with_progress(rows: Iterable[LocatedRow], name: str) -> Iterator[LocatedRow]:
    """The same rows, whose number is shown while they are read, unless that takes no time."""
    started = time.monotonic()
    bar: ProgressBar | None = None
    try:
        for count, row in enumerate(rows):
            if count % CHECKED_EVERY == 0 and time.monotonic() - started > SHOWN_AFTER:
                bar = bar or ProgressBar(f"read {name}", None)
                bar.update(count, {"rows": f"{count:,}"})
            yield row
    finally:
        if bar is not None:
            bar.close()


def _temporary_file(folder: Path) -> IO[bytes]:
    """A file without a name, in `folder` if it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return TemporaryFile(dir=folder)
    except OSError:
        return TemporaryFile()
