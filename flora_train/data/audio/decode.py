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

MOST_SECONDS = 60
"""Of a file that are decoded: twice what any model of ours hears, so that a longer one is known to be too long."""
LOWEST_RATE, HIGHEST_RATE, MOST_CHANNELS = 1000, 1_000_000, 64
"""A header that says otherwise is damaged."""
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
    """The samples in an audio file's bytes, of the first MOST_SECONDS. Raises ClipError."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = file.samplerate
            if not LOWEST_RATE <= rate <= HIGHEST_RATE or file.channels > MOST_CHANNELS:
                raise ClipError(DAMAGED)
            samples = file.read(MOST_SECONDS * rate, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
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
        if not path.is_file():  # a pipe would never end, nor would some devices
            raise ClipError(MISSING)
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ClipError(MISSING) from error
    if not content:
        raise ClipError(EMPTY)
    return content
