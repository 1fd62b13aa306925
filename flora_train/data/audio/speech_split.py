"""What do a speech task's examples look like to the model? Decoder tokens, as of any task, beside the clips that they transcribe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flora_train.data.audio.features import ClipRef
from flora_train.data.tokenization import SplitCounts, TokenSplit


@dataclass(frozen=True)
class Utterance:
    """A clip that can be used, and what is said in it. samples, positions: of its window; tokens: decoder tokens, prompt and end included."""

    path: str
    sha: str
    seconds: float
    sentence: str
    samples: int
    positions: int
    tokens: NDArray[np.int32]


@dataclass(frozen=True)
class SpeechSplit(TokenSplit):
    """paths, shas, sentences: text [n]; seconds: float32 [n]; samples, windows: int64 [n], of their windows in samples and in
    encoder positions. An example's length counts
    its encoder positions and its decoder tokens: what a step costs goes by both."""

    paths: NDArray[np.str_]
    shas: NDArray[np.str_]
    sentences: NDArray[np.str_]
    seconds: NDArray[np.float32]
    samples: NDArray[np.int64]
    windows: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return super().lengths + self.windows

    def window(self, index: int) -> int:
        return int(self.windows[index])

    def clip_ref(self, index: int) -> ClipRef:
        """The clip of an example, as the encoder gets it."""
        return ClipRef(str(self.paths[index]), str(self.shas[index]), int(self.samples[index]))


def speech_split(utterances: Sequence[Utterance], prompt_tokens: int, counts: SplitCounts) -> SpeechSplit:
    """prompt_tokens: first decoder tokens, which are read and not learnt."""
    lengths = np.array([len(u.tokens) for u in utterances], dtype=np.int64)
    return SpeechSplit(
        tokens=np.concatenate([np.empty(0, dtype=np.int32), *(u.tokens for u in utterances)]),
        offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        prompt_lengths=np.full(len(utterances), prompt_tokens, dtype=np.int32),
        label_bytes=np.array([len(u.sentence.encode()) for u in utterances], dtype=np.int64),
        packs=np.arange(len(utterances) + 1, dtype=np.int64),
        counts=counts,
        paths=np.array([u.path for u in utterances], dtype=np.str_),
        shas=np.array([u.sha for u in utterances], dtype=np.str_),
        sentences=np.array([u.sentence for u in utterances], dtype=np.str_),
        seconds=np.array([u.seconds for u in utterances], dtype=np.float32),
        samples=np.array([u.samples for u in utterances], dtype=np.int64),
        windows=np.array([u.positions for u in utterances], dtype=np.int64),
    )
