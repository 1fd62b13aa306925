"""A recording: a clip in a package, its transcript and its speaker."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SLOWEST, FASTEST = 3.0, 28.0
"""Characters a second outside of which a transcript is not what is said."""


@dataclass(frozen=True)
class Recording:
    """file: of the clip, unpacked; scene: recordings of one are never in two splits; licence: of the clip."""

    language: str
    file: Path
    sentence: str
    speaker: str
    scene: str
    source: str
    package: str
    version: str
    licence: str


def same(sentence: str) -> str:
    """Two transcripts that this makes equal are one sentence."""
    return re.sub(r"\W+", " ", sentence.casefold()).strip()


def plausible(sentence: str, seconds: float) -> bool:
    """Whether so many characters can be said in so many seconds."""
    return seconds > 0 and SLOWEST <= len(sentence) / seconds <= FASTEST
