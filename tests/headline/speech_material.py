"""The release and the model of recipe=common_voice, built once into the user's cache, and the run's sizes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from flora_train.runtime.atomic import user_cache
from tests.forked import ROOT
from tests.headline.build_speech import RELEASE

HERE = Path(__file__).resolve().parent
SOURCES = ("build_speech.py", "whisper_large.py", "sentences.yaml", "speech.requirements.txt")
SHORT, FULL = (12, 4, 4), (40, 205, 6)
"""Clips in train, dev and test of each language; FULL reaches max_validation_examples and max_examples."""
SPEECH_SIZES = (
    "training.steps=4",
    "training.tokens_per_step=16000",
    "training.tokens_per_microbatch=4000",
    "mixture.examples_per_draw=2",
    "audio.window_step=2.0",
    "evaluation.max_examples=4",
    "evaluation.max_new_tokens=8",
    "evaluation.bootstrap_samples=200",
)
"""What of recipe=common_voice is smaller here; everything else is the recipe's."""


def built_speech(clips: Sequence[int]) -> Path:
    """The folder with `clips` of each language, built if it is not there."""
    content = hashlib.sha256(str(tuple(clips)).encode())
    for name in SOURCES:
        content.update((HERE / name).read_bytes())
    folder = user_cache("headline") / f"speech-{content.hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            building = folder.with_suffix(".building")
            shutil.rmtree(building, ignore_errors=True)
            words = ["-m", "tests.headline.build_speech", str(building), "--clips", *map(str, clips)]
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
            building.rename(folder)
    return folder


def release_of(material: Path) -> Path:
    """The release's folder."""
    return material / RELEASE
