"""What can a speech task be told, and how is audio read? Language and token, columns, how errors are counted; windows of the encoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from flora_train.config.base import MOST_PROCESSES, ConfigModel, Text

Normalizer = Literal["auto", "letters", "arabic", "unspaced"]
Metric = Literal["auto", "wer", "cer"]


class SpeechConfig(ConfigModel):
    """Makes a task a speech task: its rows are clips with transcripts, its model an encoder-decoder such as Whisper."""

    language: Text
    """Code of the spoken language (cs, mr, ...): the model's language token, and what a transcript's normalizer is chosen by."""
    token: Text | None = None
    """The language token of the decoder's prompt, for a language that the model does not know: that of a related one (<|ru|>).
    Default: <|language|>."""
    prompt: list[Text] | None = Field(None, min_length=1, max_length=1000)
    """All first tokens of the decoder, by their names. Default: Whisper's four, around its language token; of another
    encoder-decoder its start token."""
    audio: Text = "path"
    """Column of the clip: a path (absolute, or relative to the manifest), or {bytes, path} as in hub data sets."""
    sentence: Text = "sentence"
    """Column of the transcript."""
    speaker: Text | None = None
    """Column of the speaker; where it is given, no speaker's clips are in training and held-out examples alike when one is split
    off by validation_fraction."""
    normalizer: Normalizer = "auto"
    """What normalised error rates ignore. letters: case, punctuation, symbols (marks such as Hindi's vowel signs are kept). arabic:
    also short vowels and tatweel. unspaced: also spaces (Chinese, Japanese, Thai, ...). auto: by language. Case is
    folded by the language's own rules (Turkish, Lithuanian, ...)."""
    metric: Metric = "auto"
    """The rate that comes first in reports. auto: cer where the normalizer is unspaced, else wer."""


class AudioConfig(ConfigModel):
    max_seconds: float = Field(30.0, ge=0.01, le=30.0)
    """Longer clips are left out, and counted."""
    window_step: float | None = Field(None, ge=0.02, le=30.0)
    """Encoder windows: a clip is padded with silence to the next multiple of so many seconds instead of to the model's 30 s, which
    costs less and is not the same to the last digit; docs/speech.md has what it does to error rates. Default: always 30 s; steps of
    1 s for encoders that hear any length (all but Whisper's)."""
    spec_augment: bool = False
    """Mask bands of time and frequency in training clips (Park et al. 2019), drawn anew for each (task, example, step). Whisper only."""
    cache_gigabytes: float = Field(20.0, gt=0, le=1_000_000)
    """Log-mel features kept on disk; beyond that, those that were not used for longest go."""
    workers: int | None = Field(None, ge=0, le=MOST_PROCESSES)
    """Processes that read clips ahead of the step, for each training process; 0: the training process does. Default: its share of
    the machine's cores, at most 8."""
