"""Batches of speech rows: the features of each distinct clip once, with the decoder tokens of every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flora_train.data.audio.features import ClipRef, FeatureStore, input_name
from flora_train.data.audio.speech_split import SpeechSplit
from flora_train.data.batch import IGNORE, MixedBatch, Row
from flora_train.data.token_split import TokenSplit

BANDS = 2
"""Bands of mel bins that SpecAugment masks."""
BAND_WIDTH = 0.15
"""Largest width of a masked band, as a share of the mel bins."""
SPANS = 2
"""Spans of time that SpecAugment masks."""
SPAN_WIDTH = 0.05
"""Largest length of a masked span, as a share of the window."""


class SpeechCollate:
    """Collates rows into batches of an encoder-decoder.

    Inputs: features float32 [clips, ...] under the model's own name for them (for Whisper input_features
    [clips, mel bins, frames]), and decoder_input_ids int64 [B, L]. Labels [B, L] are the tokens that follow.
    """

    def __init__(self, store: FeatureStore, spec_augment: bool) -> None:
        self.store, self.spec_augment = store, spec_augment

    def prefetch(self, rows: Sequence[Row], split_of: Callable[[str], TokenSplit]) -> None:
        """Start computing the features of rows that a later batch needs."""
        self.store.prefetch(dict.fromkeys(_clip_ref(row, split_of) for row in rows))

    def __call__(
        self, rows: Sequence[Row], split_of: Callable[[str], TokenSplit], pad_token: int
    ) -> MixedBatch:
        """Collate rows that share one window.

        Rows with the same clip and augmentation seed share its features.
        """
        keys = [(row.task, row.example, row.seed) for row in rows]
        clip_index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        clips = [_clip_ref(rows[keys.index(key)], split_of) for key in clip_index]
        features = [feature.astype(np.float32) for feature in self.store.get(clips)]
        if self.spec_augment:
            for i, (_, _, seed) in enumerate(clip_index):
                if seed is not None:
                    features[i] = augmented(features[i], seed)
        decoder_input_ids, labels = _decoder_tokens(rows, split_of, pad_token)
        return MixedBatch(
            inputs={
                input_name(self.store.extractor): torch.from_numpy(np.stack(features)),
                "decoder_input_ids": torch.from_numpy(decoder_input_ids),
            },
            labels=torch.from_numpy(labels),
            adapter_ids=torch.tensor([row.adapter for row in rows]),
            rows=tuple(rows),
            clips=torch.tensor([clip_index[key] for key in keys]),
        )


def augmented(features: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """SpecAugment (Park et al. 2019) without time warping: masked bands and spans are set to the mean.

    features: [mel bins, frames]. The result depends on features and seed only.
    """
    random, masked = np.random.default_rng(seed), features.copy()
    mean = features.mean()
    for axis, count, share in ((0, BANDS, BAND_WIDTH), (1, SPANS, SPAN_WIDTH)):
        size = features.shape[axis]
        for _ in range(count):
            width = int(random.integers(0, round(share * size) + 1))
            start = int(random.integers(0, size - width + 1))
            masked[(slice(None),) * axis + (slice(start, start + width),)] = mean
    return masked


def _decoder_tokens(
    rows: Sequence[Row], split_of: Callable[[str], TokenSplit], pad_token: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The decoder's input ids and labels, both [B, L]."""
    examples = [split_of(row.task).example(row.example) for row in rows]
    spans = [split_of(row.task).learnt_spans(row.example) for row in rows]
    length = max(map(len, examples)) - 1
    if length == rows[0].window:  # dropout distinguishes decoder and encoder activations by their lengths
        length += 1
    input_ids = np.full((len(rows), length), pad_token, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
    for i, (tokens, learnt) in enumerate(zip(examples, spans, strict=True)):
        input_ids[i, : len(tokens) - 1] = tokens[:-1]
        for begin, end in learnt:
            labels[i, begin - 1 : end - 1] = tokens[begin:end]
    return input_ids, labels


def _clip_ref(row: Row, split_of: Callable[[str], TokenSplit]) -> ClipRef:
    split = split_of(row.task)
    assert isinstance(split, SpeechSplit)
    return split.clip_ref(row.example)
