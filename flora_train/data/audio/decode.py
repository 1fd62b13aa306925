"""What is in an audio file? Mono samples at 16 kHz, or one word for why there are none."""

from __future__ import annotations

import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE = 16000
"""Samples per second of everything that is heard."""

MISSING, EMPTY, DAMAGED, SILENT = "no such file", "empty file", "cannot be decoded", "no samples"


class ClipError(Exception):
    """A clip that cannot be used; its text is the reason, one of the words above."""


@dataclass(frozen=True)
class Clip:
    """What a look at a file found. sha: SHA-256 of its bytes; seconds: of sound; fault: why it cannot be used, or None."""

    sha: str
    seconds: float
    fault: str | None = None


def read_clip(path: Path) -> NDArray[np.float32]:
    """float32 [n], mono at 16 kHz: channels are averaged, other rates resampled (soxr). wav, flac, ogg and mp3, whatever the file's
    name says. Raises ClipError."""
    return decode(_bytes_of(path))


def look_at(path: str) -> Clip:
    """Decode a file once, for its length and faults. Runs in worker processes."""
    try:
        content = _bytes_of(Path(path))
        return Clip(sha256(content).hexdigest(), len(decode(content)) / RATE)
    except ClipError as error:
        return Clip("", 0.0, str(error))


def decode(content: bytes) -> NDArray[np.float32]:
    """The samples in an audio file's bytes. Raises ClipError."""
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ClipError(DAMAGED) from error
    mono = _resampled(samples.mean(axis=1), rate)
    if not len(mono) or not np.isfinite(mono).all():
        raise ClipError(SILENT if not len(mono) else DAMAGED)
    return mono


def _resampled(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    if rate == RATE:
        return samples
    import soxr

    resampled: Any = soxr.resample(samples, rate, RATE)
    return resampled.astype(np.float32)


def _bytes_of(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ClipError(MISSING) from error
    if not content:
        raise ClipError(EMPTY)
    return content
