"""Where do log-mel features come from? From disk, or from worker processes that make them ahead of the step."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.data.audio.decode import RATE, read_clip

SAMPLES_PER_POSITION = 320
"""Of 16 kHz audio in one position of the encoder: two frames of 10 ms, which its second convolution joins."""


@dataclass(frozen=True)
class Heard:
    """A clip as an encoder gets it: its file, the SHA-256 of its bytes, and the encoder positions of its window."""

    path: str
    sha: str
    window: int


class FeatureStore:
    """Features of clips, float16 [mel bins, 2 x window], kept in `folder` by content up to `gigabytes`; the longest unused go first.

    extractor: a WhisperFeatureExtractor, or one with its interface; workers: processes that decode and transform (0: this one).
    Rounded to half precision whether they come from disk or not, so that the cache changes nothing.
    """

    def __init__(self, folder: Path, extractor: Any, gigabytes: float, workers: int) -> None:
        self.folder, self.extractor, self.limit, self.workers = folder, extractor, int(gigabytes * 1e9), workers
        self._settings = json.dumps(extractor.to_dict(), sort_keys=True, default=str)
        self._coming: dict[Path, Future[NDArray[np.float16]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._bytes: int | None = None

    def ahead(self, clips: Iterable[Heard]) -> None:
        """Let the workers begin with what is not on disk."""
        for clip in clips:
            path = self._path(clip)
            if self.workers and path not in self._coming and not path.exists():
                self._coming[path] = self.pool.submit(_features, self.extractor, clip)

    def get(self, clips: Sequence[Heard]) -> list[NDArray[np.float16]]:
        """The features of these clips, in their order."""
        self.ahead(clips)
        return [self._get(clip) for clip in clips]

    @property
    def pool(self) -> ProcessPoolExecutor:
        """The workers; they start when they are first needed."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_one_thread)
        return self._pool

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._coming.clear()

    def _get(self, clip: Heard) -> NDArray[np.float16]:
        path = self._path(clip)
        coming = self._coming.pop(path, None)
        if coming is None and path.exists():
            try:
                features: NDArray[np.float16] = np.load(path, allow_pickle=False)
                os.utime(path)  # its last use
                return features
            except (OSError, ValueError, EOFError):
                path.unlink(missing_ok=True)  # a damaged file is made again
        features = coming.result() if coming is not None else _features(self.extractor, clip)
        self._keep(path, features)
        return features

    def _path(self, clip: Heard) -> Path:
        key = sha256(f"{self._settings}\x1f{clip.sha}\x1f{clip.window}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key[2:40]}.npy"

    def _keep(self, path: Path, features: NDArray[np.float16]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                np.save(file, features, allow_pickle=False)
            os.replace(temporary, path)
        except OSError as error:  # a cache that cannot be written costs time, not the run
            warnings.warn(f"features are not cached: {error}", stacklevel=2)
            return
        self._make_room(path.stat().st_size)

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
            path.unlink(missing_ok=True)
            self._bytes -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, file) of all features on disk."""
        found = []
        for path in self.folder.glob("*/*.npy"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            found.append((status.st_mtime, status.st_size, path))
        return found


def _features(extractor: Any, clip: Heard) -> NDArray[np.float16]:
    """Log-mel features of a clip, padded with silence to its window. Raises ClipError."""
    samples = read_clip(Path(clip.path))
    size = clip.window * SAMPLES_PER_POSITION
    found = extractor(samples, sampling_rate=RATE, padding="max_length", max_length=size, truncation=True, return_tensors="np")
    return found["input_features"][0].astype(np.float16)


def _one_thread() -> None:
    """Workers share the cores: each computes on one."""
    import torch

    torch.set_num_threads(1)
