"""What must be known of a speech model before its data can be read? Its tokens, its windows, and where clips and features are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import did_you_mean, user_error
from flora_train.config.speech_schema import AudioConfig, SpeechConfig
from flora_train.data.audio.decode import RATE, Clip, look_at
from flora_train.data.audio.features import FeatureStore
from flora_train.data.text_encoder import TextEncoder
from flora_train.data.tokenization import own_end

START, TRANSCRIBE, NO_TIMESTAMPS = "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"

Progress = Callable[[str, int], Any]
"""(stage, total) -> a context with update(done); ProgressBar of the training floor."""


@dataclass(frozen=True)
class SpeechProcessor:
    """whisper: whether it is one, whose prompts are made around a language; else start: the decoder's first token, where the model
    says it; max_tokens: that the decoder can read; store: of features."""

    tokenizer: Any
    windows: Windows
    max_tokens: int
    whisper: bool
    start: int | None
    store: FeatureStore
    audio: AudioConfig
    progress: Progress
    encoders: dict[bool, TextEncoder] = field(default_factory=dict)

    def prompt(self, speech: SpeechConfig, key: str) -> list[int]:
        """The decoder's first tokens for a language; of Whisper: start, language, transcribe, no timestamps.

        Raises UserError for a language that the model does not know (a related one's token can be chosen), or an unknown token."""
        vocabulary = self.tokenizer.get_vocab()
        if speech.prompt is not None:
            if unknown := [word for word in speech.prompt if word not in vocabulary]:
                words = f"is no token of this model.{did_you_mean(unknown[0], vocabulary)}"
                raise user_error(f"{key}.speech.prompt", unknown[0], words)
            return [vocabulary[word] for word in speech.prompt]
        if not self.whisper:
            if speech.token is not None:
                words = "only Whisper's prompt is made around a language token: name all first tokens in speech.prompt instead"
                raise user_error(f"{key}.speech.token", speech.token, words)
            if self.start is None:
                words = "name the decoder's first tokens: this model's configuration does not say its start token"
                raise user_error(f"{key}.speech.prompt", None, words)
            return [self.start]
        languages = language_tokens(vocabulary)
        token = speech.token or f"<|{speech.language}|>"
        if token not in languages:
            if speech.token is not None:
                words = f"is no language token of this model, which are written <|cs|>.{did_you_mean(token, languages)}"
                raise user_error(f"{key}.speech.token", token, words)
            words = (
                "is a language that this model has no token for: to train it nevertheless, choose the token of a related language, "
                f"{key}.speech.token=<|xx|>.{did_you_mean(speech.language, [known[2:-2] for known in languages])}"
            )
            raise user_error(f"{key}.speech.language", speech.language, words)
        return [vocabulary[word] for word in (START, token, TRANSCRIBE, NO_TIMESTAMPS)]

    def tokens(self, prompt: list[int], sentence: str) -> NDArray[np.int32]:
        """Prompt, sentence (of Whisper after a space, as it writes) and end token."""
        return self.transcript(prompt, sentence)[0]

    def transcript(
        self, prompt: list[int], sentence: str, special_tokens: bool = False
    ) -> tuple[NDArray[np.int32], Mapping[str, int]]:
        """Its tokens, and the special tokens that are written in the sentence: text, unless `special_tokens` says that they are
        tokens; an end token then stands once. Of a sentence that is longer than the decoder can read, not all tokens are made."""
        if special_tokens not in self.encoders:
            self.encoders[special_tokens] = TextEncoder(self.tokenizer, special_tokens)
        text = f" {sentence}" if self.whisper else sentence
        (found,) = self.encoders[special_tokens].encode([(text, [(0, len(text))])], limit=self.max_tokens)
        end = [] if own_end(self.tokenizer, found) is not None else [self.tokenizer.eos_token_id]
        return np.array([*prompt, *found.ids, *end], dtype=np.int32), found.written

    @property
    def max_seconds(self) -> float:
        """The longest clip that is used."""
        return min(self.audio.max_seconds, self.windows.longest / RATE)

    def look(self, paths: list[str], what: str) -> list[Clip]:
        """Decode every file once, in the workers. what: for the progress line."""
        if not self.store.workers or len(paths) < 2:
            return [look_at(path) for path in paths]
        found: dict[int, Clip] = {}
        with self.store.ended_by_errors(), self.progress(f"read clips of {what}", len(paths)) as watch:
            coming = {self.store.submit(look_at, path): i for i, path in enumerate(paths)}
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
        raise user_error("model.path", model_path, f"has no token {missing[0]}: speech tasks need a multilingual Whisper model")


GRAIN = 320
"""Samples that a window is a multiple of: 20 ms, one position of Whisper's encoder (two frames of 10 ms that a convolution joins)."""


@dataclass(frozen=True)
class Windows:
    """longest: samples of the longest window; step: seconds (None: every window is the longest); positions: how many positions the
    encoder makes of so many samples."""

    longest: int
    step: float | None
    positions: Callable[[int], int]

    def samples(self, seconds: float) -> int:
        """Of the window of a clip that is so long: a function of the clip alone."""
        if self.step is None:
            return self.longest
        padded = max(1, math.ceil(seconds / self.step - 1e-9)) * self.step
        return min(self.longest, math.ceil(padded * RATE / GRAIN - 1e-9) * GRAIN)
