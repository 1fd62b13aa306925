"""Speech tasks: language, columns and error rates; and how audio is read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from flora_train.config.base import MOST_PROCESSES, ConfigModel, Text

Normalizer = Literal["auto", "letters", "arabic", "unspaced"]
Metric = Literal["auto", "wer", "cer"]


class SpeechConfig(ConfigModel):
    """Makes a task a speech task: rows are clips with transcripts, and the model is an encoder-decoder such
    as Whisper."""

    language: Text
    """Code of the spoken language (cs, mr, ...), which selects the language token of the model and the
    normalizer of transcripts."""
    token: Text | None = None
    """Language token of the decoder prompt, for a language that the model does not know: that of a related
    one, such as <|ru|>. Default: <|language|>."""
    prompt: list[Text] | None = Field(None, min_length=1, max_length=1000)
    """First tokens of the decoder, by name. Default: for Whisper its four prompt tokens with the language
    token; for other encoder-decoder models their start token."""
    audio: Text = "path"
    """Column of the clip: a path (absolute, or relative to the manifest), or {bytes, path} as in data sets of
    the hub."""
    sentence: Text = "sentence"
    """Column of the transcript."""
    speaker: Text | None = None
    """Column of the speaker. When validation_fraction splits rows off, all clips of a speaker are then either
    training or held-out examples. Default: rows are split by sentence."""
    normalizer: Normalizer = "auto"
    """What normalized error rates ignore. letters: case, punctuation and symbols (marks such as Hindi's vowel
    signs are kept). arabic: also short vowels and tatweel. unspaced: also spaces (Chinese, Japanese, Thai,
    ...). auto: by language. Case is folded by the rules of the language (Turkish, Lithuanian, ...)."""
    metric: Metric = "auto"
    """Error rate that reports show first. auto: cer with the unspaced normalizer, else wer."""


class AudioConfig(ConfigModel):
    max_seconds: float = Field(30.0, ge=0.01, le=30.0)
    """Length of the longest clip in seconds. Longer clips are left out and counted."""
    window_step: float | None = Field(None, ge=0.02, le=30.0)
    """Encoder windows, in seconds: a clip is padded with silence to the next multiple of this instead of to
    the 30 s of the model. This saves time and changes results slightly; docs/speech.md lists the effect on
    error rates. Default: 30 s for Whisper; steps of 1 s for encoders of variable length."""
    spec_augment: bool = False
    """Whisper only: mask bands of time and frequency in training clips (Park et al. 2019), seeded for each
    task, example and step."""
    cache_gigabytes: float = Field(20.0, gt=0, le=1_000_000)
    """Size in GB of the cache of log-mel features on disk. The least recently used features are removed."""
    workers: int | None = Field(None, ge=0, le=MOST_PROCESSES)
    """Number of processes that read clips in advance, for each training process. 0: the training process
    reads them. Default: the process's share of the machine's cores, at most 8."""
