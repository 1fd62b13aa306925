"""Where do log-mel features come from? From disk, or from worker processes that make them ahead of the step."""

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
    """A clip as an encoder gets it: its file, the SHA-256 of its bytes, and the samples of its window."""

    path: str
    sha: str
    samples: int


class FeatureStore:
    """Features of clips, as `extracted` makes them, kept in `folder` by content up to `gigabytes`; the longest unused go first.

    extractor: a feature extractor of transformers; workers: processes that decode and transform (0: this one).
    """

    def __init__(self, folder: Path, extractor: Any, gigabytes: float, workers: int) -> None:
        self.folder, self.extractor, self.limit, self.workers = folder, extractor, int(gigabytes * 1e9), workers
        self._settings = json.dumps(extractor.to_dict(), sort_keys=True, default=str)
        self._coming: dict[Path, Future[NDArray[Any]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._bytes: int | None = None

    def prefetch(self, clips: Iterable[ClipRef]) -> None:
        """Let the workers begin with what is not on disk."""
        for clip in clips:
            path = self._path(clip)
            if self.workers and path not in self._coming and not _is_there(path):
                self._coming[path] = self.submit(_features, self.extractor, clip)

    def get(self, clips: Sequence[ClipRef]) -> list[NDArray[Any]]:
        """The features of these clips, in their order."""
        with self.ended_by_errors():
            self.prefetch(clips)
            return [self._get(clip) for clip in clips]

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Let a worker do it. Workers start when they are first needed."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_one_thread)
        with _interrupts_held():
            return self._pool.submit(function, *arguments)

    @contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """An error, or Ctrl-C, ends the workers and drops what waits for them: else the process would not end before all is done."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._coming.clear()

    def _get(self, clip: ClipRef) -> NDArray[Any]:
        path = self._path(clip)
        coming = self._coming.pop(path, None)
        if coming is None and _is_there(path):
            try:
                features: NDArray[Any] = np.load(path, allow_pickle=False)
                with suppress(OSError):  # a cache that cannot be written to
                    os.utime(path)  # its last use
                return features
            except (OSError, ValueError, EOFError):
                with suppress(OSError):
                    path.unlink(missing_ok=True)  # a damaged file is made again
        features = coming.result() if coming is not None else _features(self.extractor, clip)
        self._keep(path, features)
        return features

    def _path(self, clip: ClipRef) -> Path:
        key = sha256(f"{self._settings}\x1f{clip.sha}\x1f{clip.samples}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key[2:40]}.npy"

    def _keep(self, path: Path, features: NDArray[Any]) -> None:
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
        except OSError as error:  # a cache that cannot be written costs time, not the run
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
        self._bytes = sum(size for _, size, _ in files)  # other processes write and delete, too
        for _, size, path in files:
            if self._bytes <= 0.9 * self.limit:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
            self._bytes -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, file) of all features on disk."""
        found = []
        for path in self.folder.glob("*/*.npy"):
            try:
                status = path.stat()
            except OSError:  # another process made room
                continue
            found.append((status.st_mtime, status.st_size, path))
        return found


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that may not be read
        return False


def extracted(extractor: Any, samples: NDArray[np.float32]) -> NDArray[Any]:
    """What the encoder gets of these samples: log-mel features float16 ([mel bins, frames] for Whisper), rounded whether they come
    from disk or not, so that the cache changes nothing; or, of a model that hears the wave itself, float32 [n]."""
    found = extractor(samples, sampling_rate=RATE, padding=True, return_tensors="np")[input_name(extractor)][0]
    return found.astype(np.float32 if found.ndim == 1 else np.float16)


def input_name(extractor: Any) -> str:
    """What the model calls its features."""
    return str(extractor.model_input_names[0])


def _features(extractor: Any, clip: ClipRef) -> NDArray[Any]:
    """Features of a clip, padded with silence to its window. Raises ClipError."""
    samples = read_clip(Path(clip.path))[: clip.samples]
    return extracted(extractor, np.pad(samples, (0, clip.samples - len(samples))))


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes that start meanwhile never see Ctrl-C, not even while they load: the main process ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _one_thread() -> None:
    """Workers share the cores: each computes on one."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
