"""Examples of a speech task: decoder tokens as in any task, with the clips that they transcribe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flora_train.data.audio.features import ClipRef
from flora_train.data.token_split import SplitCounts, TokenSplit, spans_after


@dataclass(frozen=True)
class Utterance:
    """A usable clip and its transcript."""

    path: str
    sha: str
    """SHA-256 of the file's bytes."""
    seconds: float
    sentence: str
    samples: int
    """Samples of the clip's window."""
    positions: int
    """Encoder positions of the clip's window."""
    tokens: NDArray[np.int32]
    """Decoder tokens, including prompt and end token."""


@dataclass(frozen=True)
class SpeechSplit(TokenSplit):
    """A TokenSplit with the clip of every example.

    The length of an example is the sum of its encoder positions and decoder tokens: both cost time in a step.
    """

    paths: NDArray[np.str_]
    """Text [n]."""
    shas: NDArray[np.str_]
    """Text [n]: SHA-256 of the clips' bytes."""
    sentences: NDArray[np.str_]
    """Text [n]: the transcripts."""
    seconds: NDArray[np.float32]
    """float32 [n]: lengths of the clips."""
    samples: NDArray[np.int64]
    """int64 [n]: samples of the clips' windows."""
    windows: NDArray[np.int64]
    """int64 [n]: encoder positions of the clips' windows."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        return super().lengths + self.windows

    def window(self, index: int) -> int:
        return int(self.windows[index])

    def clip_ref(self, index: int) -> ClipRef:
        """The clip of an example, as the feature store needs it."""
        return ClipRef(str(self.paths[index]), str(self.shas[index]), int(self.samples[index]))


def speech_split(utterances: Sequence[Utterance], prompt_tokens: int, counts: SplitCounts) -> SpeechSplit:
    """Build a split. prompt_tokens: number of decoder tokens at the start that carry no loss."""
    lengths = np.array([len(u.tokens) for u in utterances], dtype=np.int64)
    return SpeechSplit(
        tokens=np.concatenate([np.empty(0, dtype=np.int32), *(u.tokens for u in utterances)]),
        offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        **spans_after(np.full(len(utterances), prompt_tokens), lengths),
        label_bytes=np.array([len(u.sentence.encode()) for u in utterances], dtype=np.int64),
        pack_offsets=np.arange(len(utterances) + 1, dtype=np.int64),
        counts=counts,
        paths=np.array([u.path for u in utterances], dtype=np.str_),
        shas=np.array([u.sha for u in utterances], dtype=np.str_),
        sentences=np.array([u.sentence for u in utterances], dtype=np.str_),
        seconds=np.array([u.seconds for u in utterances], dtype=np.float32),
        samples=np.array([u.samples for u in utterances], dtype=np.int64),
        windows=np.array([u.positions for u in utterances], dtype=np.int64),
    )
