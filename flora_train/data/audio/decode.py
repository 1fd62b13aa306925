"""Decodes audio files into mono samples at 16 kHz, or gives the reason why a file cannot be used."""

from __future__ import annotations

import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE = 16000
"""Samples per second after decoding."""

MOST_SECONDS = 60
"""Seconds of a file that are decoded: twice the longest window, so that longer clips are recognised."""
LOWEST_RATE, HIGHEST_RATE, MOST_CHANNELS = 1000, 1_000_000, 64
"""A header with other values is damaged."""
MISSING, EMPTY, DAMAGED, SILENT = "no such file", "empty file", "cannot be decoded", "no samples"


class ClipError(Exception):
    """A clip cannot be used; the text is one of the reasons above."""


@dataclass(frozen=True)
class Clip:
    """The result of checking one audio file."""

    sha: str
    """SHA-256 of the file's bytes."""
    seconds: float
    """Length of the decoded audio."""
    fault: str | None = None
    """Reason why the clip cannot be used; None if it can."""


def read_clip(path: Path) -> NDArray[np.float32]:
    """Read a wav, flac, ogg or mp3 file as float32 [n], mono at 16 kHz. Raises ClipError.

    The format is taken from the content, not the file name. Channels are averaged, other rates resampled
    (soxr).
    """
    return decode(_bytes_of(path))


def check_clip(path: str) -> Clip:
    """Decode a file once for its length and faults. Runs in worker processes."""
    try:
        content = _bytes_of(Path(path))
        return Clip(sha256(content).hexdigest(), len(decode(content)) / RATE)
    except ClipError as error:
        return Clip("", 0.0, str(error))


def decode(content: bytes) -> NDArray[np.float32]:
    """The samples in an audio file's bytes, at most the first MOST_SECONDS. Raises ClipError."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = file.samplerate
            if not LOWEST_RATE <= rate <= HIGHEST_RATE or file.channels > MOST_CHANNELS:
                raise ClipError(DAMAGED)
            samples = file.read(MOST_SECONDS * rate, dtype="float32", always_2d=True)
    except (
        soundfile.LibsndfileError,
        RuntimeError,
        ValueError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise ClipError(DAMAGED) from error
    mono = _resampled(samples.mean(axis=1), rate)
    if not len(mono):
        raise ClipError(SILENT)
    if not np.isfinite(mono).all():
        raise ClipError(DAMAGED)
    return mono


def _resampled(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    if rate == RATE:
        return samples
    import soxr

    resampled: Any = soxr.resample(samples, rate, RATE)
    return resampled.astype(np.float32)


def _bytes_of(path: Path) -> bytes:
    try:
        if not path.is_file():  # reading a pipe or some devices would never end
            raise ClipError(MISSING)
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ClipError(MISSING) from error
    if not content:
        raise ClipError(EMPTY)
    return content
