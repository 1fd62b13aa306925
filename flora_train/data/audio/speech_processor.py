"""SpeechProcessor: a speech model's tokens, windows and feature store, as needed to read its data."""

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
from flora_train.data.audio.decode import RATE, Clip, check_clip
from flora_train.data.audio.features import FeatureStore
from flora_train.data.text_encoder import TextEncoder
from flora_train.data.tokenization import own_end

START, TRANSCRIBE, NO_TIMESTAMPS = "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"

GRAIN = 320
"""Samples of which every window is a multiple: 20 ms, one position of Whisper's encoder.

A position joins two frames of 10 ms by a convolution.
"""

Progress = Callable[[str, int], Any]
"""(stage, total) -> a context with update(done), such as ProgressBar."""


@dataclass(frozen=True)
class Windows:
    """The lengths that clips are padded to."""

    longest: int
    """Samples of the longest window."""
    step: float | None
    """Windows are multiples of this many seconds; None: every window is the longest."""
    positions: Callable[[int], int]
    """Samples of a window -> positions that the encoder computes for it."""

    def samples(self, seconds: float) -> int:
        """Samples of the window of a clip; depends on the clip's length only."""
        if self.step is None:
            return self.longest
        padded = max(1, math.ceil(seconds / self.step - 1e-9)) * self.step
        return min(self.longest, math.ceil(padded * RATE / GRAIN - 1e-9) * GRAIN)


@dataclass(frozen=True, kw_only=True)
class SpeechProcessor:
    """Turns sentences into decoder tokens and clips into features, for one speech model."""

    tokenizer: Any
    windows: Windows
    max_tokens: int
    """Tokens that the decoder can read."""
    whisper: bool
    """Whether the model is a Whisper, whose prompts contain a language token."""
    start: int | None
    """The decoder's first token of other models, if their configuration has one."""
    store: FeatureStore
    audio: AudioConfig
    progress: Progress
    encoders: dict[bool, TextEncoder] = field(default_factory=dict)
    """Encoders of sentences, with special tokens (True) and without."""

    def prompt(self, speech: SpeechConfig, key: str) -> list[int]:
        """The decoder's first tokens for a language; for Whisper: start, language, transcribe, no timestamps.

        Raises UserError for an unknown token, or a language without a token in this model.
        """
        vocabulary = self.tokenizer.get_vocab()
        if speech.prompt is not None:
            if unknown := [word for word in speech.prompt if word not in vocabulary]:
                hint = f"is not a token of this model.{did_you_mean(unknown[0], vocabulary)}"
                raise user_error(f"{key}.speech.prompt", unknown[0], hint)
            return [vocabulary[word] for word in speech.prompt]
        if self.whisper:
            token = _language_token(vocabulary, speech, key)
            return [vocabulary[word] for word in (START, token, TRANSCRIBE, NO_TIMESTAMPS)]
        if speech.token is not None:
            hint = (
                "only Whisper's prompt contains a language token: list all first tokens in speech.prompt "
                "instead"
            )
            raise user_error(f"{key}.speech.token", speech.token, hint)
        if self.start is None:
            hint = (
                "is required: list the decoder's first tokens; this model's configuration does not say its "
                "start token"
            )
            raise user_error(f"{key}.speech.prompt", None, hint)
        return [self.start]

    def tokens(self, prompt: list[int], sentence: str) -> NDArray[np.int32]:
        """Prompt, sentence (for Whisper with a leading space, as it writes) and end token."""
        return self.transcript(prompt, sentence)[0]

    def transcript(
        self, prompt: list[int], sentence: str, special_tokens: bool = False
    ) -> tuple[NDArray[np.int32], Mapping[str, int]]:
        """The tokens of prompt, sentence and end token, and counts of special tokens written in the sentence.

        special_tokens: encode these as tokens instead of text; an end token then occurs once. A sentence
        longer than the decoder can read is encoded only in part.
        """
        if special_tokens not in self.encoders:
            self.encoders[special_tokens] = TextEncoder(self.tokenizer, special_tokens)
        text = f" {sentence}" if self.whisper else sentence
        (encoded,) = self.encoders[special_tokens].encode([(text, [(0, len(text))])], limit=self.max_tokens)
        ids = [*prompt, *encoded.ids]
        if own_end(self.tokenizer, encoded) is None:
            ids.append(self.tokenizer.eos_token_id)
        return np.array(ids, dtype=np.int32), encoded.written

    @property
    def max_seconds(self) -> float:
        """The longest clip that is used."""
        return min(self.audio.max_seconds, self.windows.longest / RATE)

    def check_clips(self, paths: list[str], name: str) -> list[Clip]:
        """Decode every file once, in the workers. name: shown in the progress line."""
        if not self.store.workers or len(paths) < 2:
            return [check_clip(path) for path in paths]
        checked: dict[int, Clip] = {}
        with self.store.closed_on_error(), self.progress(f"read clips of {name}", len(paths)) as progress:
            pending = {self.store.submit(check_clip, path): i for i, path in enumerate(paths)}
            for future in as_completed(pending):
                checked[pending[future]] = future.result()
                progress.update(len(checked))
        return [checked[i] for i in range(len(paths))]


def language_tokens(vocabulary: Any) -> list[str]:
    """<|en|>, <|zh|>, <|haw|>, ... of a Whisper vocabulary."""
    return sorted(word for word in vocabulary if re.fullmatch(r"<\|[a-z]{2,3}\|>", word))


def check_multilingual(tokenizer: Any, model_path: str, is_english_only: bool = False) -> None:
    """Raises UserError unless the tokenizer is that of a multilingual Whisper.

    is_english_only: what the model's own files say; the tokenizers of English-only models have tokens of
    languages, too, which those models never saw.
    """
    vocabulary = tokenizer.get_vocab()
    if is_english_only:
        same_size = model_path.removesuffix(".en")
        instead = same_size if same_size != model_path else "one without .en in its name"
        hint = f"is an English-only Whisper, which was trained without language tokens: use {instead}"
        raise user_error("model.path", model_path, hint)
    if missing := [word for word in (START, TRANSCRIBE, NO_TIMESTAMPS) if word not in vocabulary]:
        hint = f"has no token {missing[0]}: speech tasks need a multilingual Whisper model"
        raise user_error("model.path", model_path, hint)


def _language_token(vocabulary: Any, speech: SpeechConfig, key: str) -> str:
    """The language token of a task for Whisper. Raises UserError if the model has none."""
    languages = language_tokens(vocabulary)
    token = speech.token or f"<|{speech.language}|>"
    if token in languages:
        return token
    if speech.token is not None:
        hint = (
            f"is not a language token of this model, which look like <|cs|>.{did_you_mean(token, languages)}"
        )
        raise user_error(f"{key}.speech.token", token, hint)
    codes = [known[2:-2] for known in languages]
    hint = (
        "is a language that this model has no token for: to train it anyway, choose the token of a related "
        f"language, {key}.speech.token=<|xx|>.{did_you_mean(speech.language, codes)}"
    )
    raise user_error(f"{key}.speech.language", speech.language, hint)
