"""How do rows of clips become a batch? Every clip's features once, whoever hears them; decoder tokens beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flora_train.data.audio.features import ClipRef, FeatureStore, input_name
from flora_train.data.audio.speech_split import SpeechSplit
from flora_train.data.batch import IGNORE, MixedBatch, Row
from flora_train.data.tokenization import TokenSplit

BANDS, BAND_WIDTH = 2, 0.15
"""Of mel bins that SpecAugment masks, and the widest, as a share of them."""
SPANS, SPAN_WIDTH = 2, 0.05
"""Of time that it masks, and the longest, as a share of the window."""


class SpeechCollate:
    """Batches of an encoder-decoder: features float32 [clips, ...], under the name that the model has for them (input_features
    [clips, mel bins, frames] of Whisper), and decoder_input_ids int64 [B, L]; labels [B, L] are what each of these predicts."""

    def __init__(self, store: FeatureStore, spec_augment: bool) -> None:
        self.store, self.spec_augment = store, spec_augment

    def prefetch(self, rows: Sequence[Row], split_of: Callable[[str], TokenSplit]) -> None:
        """Let the features of these rows be made, for a batch that comes soon."""
        self.store.prefetch(dict.fromkeys(_clip_ref(row, split_of) for row in rows))

    def __call__(self, rows: Sequence[Row], split_of: Callable[[str], TokenSplit], pad_token: int) -> MixedBatch:
        """All rows have one window. Rows of one clip, and of one seed where it is augmented, share its features."""
        keys = [(row.task, row.example, row.seed) for row in rows]
        places = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        features = self.store.get([_clip_ref(rows[keys.index(key)], split_of) for key in places])
        heard = [feature.astype(np.float32) for feature in features]
        if self.spec_augment:
            heard = [one if seed is None else augmented(one, seed) for one, (_, _, seed) in zip(heard, places, strict=True)]
        examples = [split_of(row.task).example(row.example) for row in rows]
        prompts = [int(split_of(row.task).prompt_lengths[row.example]) for row in rows]
        length = max(map(len, examples)) - 1
        length += length == rows[0].window  # dropout tells decoder and encoder apart by their lengths
        read = np.full((len(rows), length), pad_token, dtype=np.int64)
        labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
        for i, (tokens, prompt) in enumerate(zip(examples, prompts, strict=True)):
            read[i, : len(tokens) - 1] = tokens[:-1]
            labels[i, prompt - 1 : len(tokens) - 1] = tokens[prompt:]
        return MixedBatch(
            inputs={
                input_name(self.store.extractor): torch.from_numpy(np.stack(heard)),
                "decoder_input_ids": torch.from_numpy(read),
            },
            labels=torch.from_numpy(labels),
            adapter_ids=torch.tensor([row.adapter for row in rows]),
            rows=tuple(rows),
            clips=torch.tensor([places[key] for key in keys]),
        )


def augmented(features: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """SpecAugment (Park et al. 2019) without time warping: bands of mel bins and spans of frames set to the mean. A function of
    features [mel bins, frames] and seed."""
    random, masked = np.random.default_rng(seed), features.copy()
    mean = features.mean()
    for axis, count, share in ((0, BANDS, BAND_WIDTH), (1, SPANS, SPAN_WIDTH)):
        size = features.shape[axis]
        for _ in range(count):
            width = int(random.integers(0, round(share * size) + 1))
            start = int(random.integers(0, size - width + 1))
            masked[(slice(None),) * axis + (slice(start, start + width),)] = mean
    return masked


def _clip_ref(row: Row, split_of: Callable[[str], TokenSplit]) -> ClipRef:
    split = split_of(row.task)
    assert isinstance(split, SpeechSplit)
    return split.clip_ref(row.example)
