"""Clips of many formats decode alike, and unusable files give one reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from flora_train.data.audio.decode import (
    DAMAGED,
    EMPTY,
    MISSING,
    RATE,
    SILENT,
    ClipError,
    check_clip,
    decode,
    read_clip,
)
from tests.speech import write_clip


def tone(seconds: float, rate: int, channels: int) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    return np.stack([wave * (c + 1) / channels for c in range(channels)], axis=1)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_stereo_at_48_kilohertz_is_one_channel_at_16(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"clip.{ending}"
    soundfile.write(file, tone(1.0, 48000, 2), 48000)
    heard = read_clip(file)
    assert heard.dtype == np.float32
    assert len(heard) == pytest.approx(RATE, abs=RATE // 10)  # mp3 pads
    spectrum = np.abs(np.fft.rfft(heard))
    assert np.argmax(spectrum) * RATE / len(heard) == pytest.approx(440, abs=5)
    assert np.abs(heard).max() == pytest.approx(0.375, abs=0.05)  # the mean of both channels
    np.testing.assert_array_equal(decode(file.read_bytes()), heard)


def test_a_clip_at_16_kilohertz_is_not_resampled(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 1600).astype(np.float32)
    soundfile.write(tmp_path / "clip.wav", samples, RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_clip(tmp_path / "clip.wav"), samples)


def test_read_clip_gives_a_reason_for_an_unusable_file(tmp_path: Path) -> None:
    (tmp_path / "zero.mp3").touch()
    (tmp_path / "text.mp3").write_text("this is no sound")
    cut = write_clip(tmp_path / "whole.flac", 1.0).read_bytes()[:60]
    (tmp_path / "cut.flac").write_bytes(cut)
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, dtype=np.float32), RATE, subtype="FLOAT")
    reasons = {
        "absent.wav": MISSING,
        "zero.mp3": EMPTY,
        "text.mp3": DAMAGED,
        "nothing.wav": SILENT,
        "nan.wav": DAMAGED,
    }
    for name, reason in reasons.items():
        with pytest.raises(ClipError, match=reason):
            read_clip(tmp_path / name)
        assert check_clip(str(tmp_path / name)).fault == reason
    assert check_clip(str(tmp_path / "cut.flac")).fault in (DAMAGED, SILENT)


def test_check_clip_returns_length_and_hash(tmp_path: Path) -> None:
    one, other = (check_clip(str(write_clip(tmp_path / f"{seed}.wav", 0.5, seed))) for seed in (1, 2))
    assert (one.seconds, one.fault) == (0.5, None)
    assert one.sha != other.sha
