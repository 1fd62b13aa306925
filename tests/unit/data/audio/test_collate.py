"""Batches of clips: each clip once, decoder inputs and labels, augmentation by example."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flora_train.data.audio.collate import SpeechCollate, augmented
from flora_train.data.audio.speech_split import SpeechSplit
from flora_train.data.batch import IGNORE, MixedBatch, Row, group_by_length
from tests.speech import MEL_BINS, tiny_speech_processor, write_corpus
from tests.unit.data.audio.test_speech_task import load


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> SpeechSplit:
    folder = tmp_path_factory.mktemp("speech")
    train = load(write_corpus(folder, "cs"), folder, {"window_step": 0.5}).train
    assert isinstance(train, SpeechSplit)
    return train


def rows_of(split: SpeechSplit, *pairs: tuple[int, int], seed: int | None = None) -> list[Row]:
    """(adapter, example)"""
    return [Row(a, "cs", i, int(split.lengths[i]), split.window(i), seed=seed) for a, i in pairs]


def batch_of(split: SpeechSplit, rows: list[Row], folder: Path, spec_augment: bool = False) -> MixedBatch:
    return SpeechCollate(tiny_speech_processor(folder).store, spec_augment)(rows, lambda task: split, 7)


def test_rows_of_one_clip_share_its_features(split: SpeechSplit, tmp_path: Path) -> None:
    batch = batch_of(split, rows_of(split, (0, 2), (0, 3), (1, 2), (2, 3)), tmp_path)
    assert batch.inputs["input_features"].shape == (2, MEL_BINS, 2 * split.window(2))
    assert batch.clips is not None
    assert batch.clips.tolist() == [0, 1, 0, 1]
    assert batch.adapter_ids.tolist() == [0, 0, 1, 2]
    assert batch.padded_tokens == batch.labels.numel() + 4 * split.window(2)


def test_position_i_of_the_decoder_predicts_label_i(split: SpeechSplit, tmp_path: Path) -> None:
    batch = batch_of(split, rows_of(split, (0, 2), (0, 3)), tmp_path)
    read = batch.inputs["decoder_input_ids"]
    for row, example in enumerate((2, 3)):
        tokens = torch.from_numpy(split.example(example).astype(np.int64))
        n = len(tokens) - 1
        assert read[row, :n].tolist() == tokens[:-1].tolist()
        assert batch.labels[row, :3].tolist() == [IGNORE] * 3  # language, task, no timestamps
        assert batch.labels[row, 3:n].tolist() == tokens[4:].tolist()
        assert (batch.labels[row, n:] == IGNORE).all()
        assert (read[row, n:] == 7).all()
        assert int((batch.labels[row] != IGNORE).sum()) == split.label_counts[example]


def test_the_decoder_is_never_as_long_as_the_window(split: SpeechSplit, tmp_path: Path) -> None:
    """Dropout tells the two apart by their lengths."""
    (row,) = rows_of(split, (0, 0))
    length = len(split.example(0)) - 1
    batch = batch_of(split, [replace(row, window=length)], tmp_path)
    assert batch.labels.shape[1] == length + 1


def test_a_batch_has_one_window_and_one_use_of_the_encoder(split: SpeechSplit) -> None:
    rows = rows_of(split, *((a, i) for a in (0, 1) for i in range(10)))
    rows = [replace(row, shares_encoding=row.adapter == 1) for row in rows]
    groups = group_by_length(rows, 10_000)
    assert sorted(row.example for group in groups for row in group) == sorted(row.example for row in rows)
    kinds = [{(row.window, row.shares_encoding) for row in group} for group in groups]
    assert all(len(kind) == 1 for kind in kinds)
    assert len(kinds) == 2 * len(set(split.windows.tolist()))


def test_augmentation_is_drawn_from_the_seed_alone(split: SpeechSplit, tmp_path: Path) -> None:
    plain = batch_of(split, rows_of(split, (0, 2), (1, 2)), tmp_path, spec_augment=True)
    one = batch_of(split, rows_of(split, (0, 2), (1, 2), seed=1), tmp_path, spec_augment=True)
    with_others = batch_of(split, rows_of(split, (0, 3), (0, 2), seed=1), tmp_path, spec_augment=True)
    other = batch_of(split, rows_of(split, (0, 2), seed=2), tmp_path, spec_augment=True)
    assert torch.equal(
        plain.inputs["input_features"],
        batch_of(split, rows_of(split, (0, 2)), tmp_path).inputs["input_features"],
    )
    features = one.inputs["input_features"]
    assert len(features) == 1  # both adapters hear the same
    assert torch.equal(features[0], with_others.inputs["input_features"][1])
    assert not torch.equal(features[0], other.inputs["input_features"][0])
    assert not torch.equal(features[0], plain.inputs["input_features"][0])


def test_masks_are_bands_of_bounded_width() -> None:
    features = np.random.default_rng(0).standard_normal((80, 1000)).astype(np.float32)
    for seed in range(50):
        masked = augmented(features, seed)
        changed = masked != features
        bands, spans = changed.all(axis=1).sum(), changed.all(axis=0).sum()
        assert bands <= 2 * 12
        assert spans <= 2 * 50
        assert changed.sum() == bands * 1000 + spans * 80 - bands * spans
        assert np.isfinite(masked).all()
