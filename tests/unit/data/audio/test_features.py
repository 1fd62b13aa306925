"""Features equal the extractor's, from disk, worker or this process, and the cache keeps its size limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flora_train.data.audio.decode import check_clip, read_clip
from flora_train.data.audio.features import ClipRef, FeatureStore
from flora_train.data.audio.speech_processor import GRAIN
from tests.speech import MEL_BINS, tiny_extractor, write_clip


def heard(folder: Path, seconds: float = 0.8, seed: int = 0, window: int = 50) -> ClipRef:
    path = write_clip(folder / f"{seed}.wav", seconds, seed)
    return ClipRef(str(path), check_clip(str(path)).sha, window * GRAIN)


def store(folder: Path, gigabytes: float = 1.0, workers: int = 0) -> FeatureStore:
    return FeatureStore(folder / "features", tiny_extractor(), gigabytes=gigabytes, workers=workers)


def test_a_short_window_begins_as_the_long_one_does(tmp_path: Path) -> None:
    clip = heard(tmp_path)
    (short,) = store(tmp_path).get([clip])
    assert (short.shape, short.dtype) == ((MEL_BINS, 100), np.float16)
    whole = tiny_extractor()(read_clip(Path(clip.path)), sampling_rate=16000, return_tensors="np")[
        "input_features"
    ][0]
    assert whole.shape == (MEL_BINS, 200)
    np.testing.assert_allclose(short, whole[:, :100], atol=2e-3)


def test_features_are_the_same_from_disk_worker_and_this_process(tmp_path: Path) -> None:
    clips = [heard(tmp_path, seed=seed) for seed in range(3)]
    here = store(tmp_path / "a").get(clips)
    again = store(tmp_path / "a").get(clips)
    with_worker = store(tmp_path / "b", workers=1)
    with_worker.prefetch(clips)
    there = with_worker.get(clips)
    with_worker.close()
    for one, two, three in zip(here, again, there, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    assert not np.array_equal(here[0], here[1])


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    clip = heard(tmp_path)
    (before,) = store(tmp_path).get([clip])
    (file,) = (tmp_path / "features").glob("*/*.npy")
    file.write_bytes(file.read_bytes()[:50])
    np.testing.assert_array_equal(store(tmp_path).get([clip])[0], before)


def test_the_least_recently_used_features_are_deleted_at_the_size_limit(tmp_path: Path) -> None:
    clips = [heard(tmp_path, seed=seed) for seed in range(6)]
    size = 2 * MEL_BINS * 100 + 128
    small = store(tmp_path, gigabytes=4.5 * size / 1e9)
    for clip in clips:
        small.get([clip])
        small.get([clips[0]])  # which is used all the time
    kept = {path.name for path in (tmp_path / "features").glob("*/*.npy")}
    assert len(kept) <= 4
    assert small._path(clips[0]).name in kept
    assert small._path(clips[5]).name in kept
    assert small._path(clips[1]).name not in kept


def test_other_content_or_window_has_another_cache_entry(tmp_path: Path) -> None:
    clip = heard(tmp_path)
    places = {
        store(tmp_path)._path(ClipRef(clip.path, sha, window * GRAIN))
        for sha in (clip.sha, "other")
        for window in (50, 100)
    }
    assert len(places) == 4


@pytest.mark.parametrize("seconds", [0.01, 1.0])
def test_a_clip_shorter_than_its_window_is_padded_with_silence(seconds: float, tmp_path: Path) -> None:
    (features,) = store(tmp_path).get([heard(tmp_path, seconds)])
    assert np.isfinite(features).all()
    if seconds < 0.5:
        assert features[:, 20:].std() < 1e-3
