"""Log-mel features of clips: cached on disk, and computed ahead of a step by worker processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.data.audio.decode import RATE, read_clip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipRef:
    """A clip and the window that it is padded to."""

    path: str
    sha: str
    """SHA-256 of the file's bytes."""
    samples: int
    """Samples of the window."""


class FeatureStore:
    """Features of clips, cached in a folder under the hash of the clip's content.

    extractor: a feature extractor of transformers. gigabytes: size limit of the cache; the least recently
    used files are deleted first. workers: processes that decode and transform (0: this process).
    """

    def __init__(self, folder: Path, extractor: Any, *, gigabytes: float, workers: int) -> None:
        self.folder, self.extractor, self.limit, self.workers = (
            folder,
            extractor,
            int(gigabytes * 1e9),
            workers,
        )
        self._settings = json.dumps(extractor.to_dict(), sort_keys=True, default=str)
        self._pending: dict[Path, Future[NDArray[Any]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._bytes: int | None = None

    def prefetch(self, clips: Iterable[ClipRef]) -> None:
        """Start computing the features that are not on disk, in the workers."""
        for clip in clips:
            path = self._path(clip)
            if self.workers and path not in self._pending and not _exists(path):
                self._pending[path] = self.submit(_features, self.extractor, clip)

    def get(self, clips: Sequence[ClipRef]) -> list[NDArray[Any]]:
        """The features of these clips, in their order."""
        with self.closed_on_error():
            self.prefetch(clips)
            return [self._get(clip) for clip in clips]

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run a function in a worker. Workers are started on the first call."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_one_thread)
        with _interrupts_blocked():
            return self._pool.submit(function, *arguments)

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """End the workers on an error or Ctrl-C, as the process would otherwise wait for their queue."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers and drop their queue."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._pending.clear()

    def _get(self, clip: ClipRef) -> NDArray[Any]:
        path = self._path(clip)
        pending = self._pending.pop(path, None)
        if pending is not None:
            features = pending.result()
        else:
            cached = _load(path) if _exists(path) else None
            if cached is not None:
                return cached
            features = _features(self.extractor, clip)
        self._save(path, features)
        return features

    def _path(self, clip: ClipRef) -> Path:
        key = sha256(f"{self._settings}\x1f{clip.sha}\x1f{clip.samples}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key[2:40]}.npy"

    def _save(self, path: Path, features: NDArray[Any]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    np.save(file, features, allow_pickle=False)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:  # a cache that cannot be written must not stop the run
            logger.warning(f"features are not cached: {error}")
            return
        self._make_room(features.nbytes)

    def _make_room(self, added: int) -> None:
        if self._bytes is None:
            self._bytes = sum(size for _, size, _ in self._files())
        else:
            self._bytes += added
        if self._bytes <= self.limit:
            return
        files = sorted(self._files())
        self._bytes = sum(size for _, size, _ in files)  # other processes write and delete as well
        for _, size, path in files:
            if self._bytes <= 0.9 * self.limit:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
            self._bytes -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, file) of all features on disk."""
        files = []
        for path in self.folder.glob("*/*.npy"):
            try:
                status = path.stat()
            except OSError:  # deleted by another process
                continue
            files.append((status.st_mtime, status.st_size, path))
        return files


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder without read permission
        return False


def _load(path: Path) -> NDArray[Any] | None:
    """Features from the cache; a damaged file is deleted, and None is returned."""
    try:
        features: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # a read-only cache
        os.utime(path)  # the time of the last use
    return features


def extracted(extractor: Any, samples: NDArray[np.float32]) -> NDArray[Any]:
    """The encoder's input for these samples.

    Log-mel features are float16 ([mel bins, frames] for Whisper), whether or not they come from disk, so that
    the cache changes nothing. A model that reads the waveform gets float32 [n].
    """
    features = extractor(samples, sampling_rate=RATE, padding=True, return_tensors="np")[
        input_name(extractor)
    ][0]
    dtype = np.float32 if features.ndim == 1 else np.float16
    return features.astype(dtype)


def input_name(extractor: Any) -> str:
    """The model's name for its features."""
    return str(extractor.model_input_names[0])


def _features(extractor: Any, clip: ClipRef) -> NDArray[Any]:
    """Features of a clip, padded with silence to its window. Raises ClipError."""
    samples = read_clip(Path(clip.path))[: clip.samples]
    return extracted(extractor, np.pad(samples, (0, clip.samples - len(samples))))


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C in processes started in this context, even while they load; the main process ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _one_thread() -> None:
    """Limit a worker to one core, as workers share the cores."""
    import torch

    # the decoder of mp3 files prints a line about each damaged one, which is counted and listed
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
