"""What must be known of a speech model before its data can be read? Its tokens, its window, and where clips and features are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import did_you_mean, fail
from flora_train.config.speech_schema import AudioConfig, SpeechConfig
from flora_train.data.audio.decode import RATE, Clip, look_at
from flora_train.data.audio.features import SAMPLES_PER_POSITION, FeatureStore

POSITIONS_PER_SECOND = RATE // SAMPLES_PER_POSITION
START, TRANSCRIBE, NO_TIMESTAMPS = "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"

Progress = Callable[[str, int], Any]
"""(stage, total) -> a context with update(done); Watch of the training floor."""


@dataclass(frozen=True)
class Ears:
    """tokenizer: Whisper's; positions: of the encoder's longest window; max_tokens: of the decoder; store: of features."""

    tokenizer: Any
    positions: int
    max_tokens: int
    store: FeatureStore
    audio: AudioConfig
    progress: Progress

    def prompt(self, speech: SpeechConfig, key: str) -> list[int]:
        """The decoder's first tokens for a language: start, language, transcribe, no timestamps.

        Raises UserError for a language that the model does not know (a related one's token can be chosen), or an unknown token."""
        vocabulary = self.tokenizer.get_vocab()
        languages = language_tokens(vocabulary)
        token = speech.token or f"<|{speech.language}|>"
        if token not in languages:
            if speech.token is not None:
                words = f"is no language token of this model, which are written <|cs|>.{did_you_mean(token, languages)}"
                raise fail(f"{key}.speech.token", token, words)
            words = (
                "is a language that this model has no token for: to train it nevertheless, choose the token of a related language, "
                f"{key}.speech.token=<|xx|>.{did_you_mean(speech.language, [known[2:-2] for known in languages])}"
            )
            raise fail(f"{key}.speech.language", speech.language, words)
        return [vocabulary[word] for word in (START, token, TRANSCRIBE, NO_TIMESTAMPS)]

    def tokens(self, prompt: list[int], sentence: str) -> NDArray[np.int32]:
        """Prompt, sentence (after a space, as Whisper writes) and end token."""
        text = self.tokenizer(f" {sentence}", add_special_tokens=False)["input_ids"]
        return np.array([*prompt, *text, self.tokenizer.eos_token_id], dtype=np.int32)

    def window(self, seconds: float) -> int:
        """Encoder positions of a clip: all, or as many as the next multiple of audio.window_step takes."""
        step = self.audio.window_step
        if step is None:
            return self.positions
        padded = max(1, math.ceil(seconds / step - 1e-9)) * step
        return min(self.positions, math.ceil(padded * POSITIONS_PER_SECOND - 1e-9))

    @property
    def max_seconds(self) -> float:
        """The longest clip that is used."""
        return min(self.audio.max_seconds, self.positions / POSITIONS_PER_SECOND)

    def look(self, paths: list[str], what: str) -> list[Clip]:
        """Decode every file once, in the workers. what: for the progress line."""
        if not self.store.workers or len(paths) < 2:
            return [look_at(path) for path in paths]
        found: dict[int, Clip] = {}
        with self.progress(f"read clips of {what}", len(paths)) as watch:
            coming = {self.store.pool.submit(look_at, path): i for i, path in enumerate(paths)}
            for future in as_completed(coming):
                found[coming[future]] = future.result()
                watch.update(len(found))
        return [found[i] for i in range(len(paths))]


def language_tokens(vocabulary: Any) -> list[str]:
    """<|en|>, <|zh|>, <|haw|>, ... of a Whisper vocabulary."""
    return sorted(word for word in vocabulary if re.fullmatch(r"<\|[a-z]{2,3}\|>", word))


def check_tokenizer_speaks(tokenizer: Any, model_path: str) -> None:
    """Raises UserError unless the tokenizer is that of a multilingual Whisper."""
    vocabulary = tokenizer.get_vocab()
    if missing := [word for word in (START, TRANSCRIBE, NO_TIMESTAMPS) if word not in vocabulary]:
        raise fail("model.path", model_path, f"has no token {missing[0]}: speech tasks need a multilingual Whisper model")
