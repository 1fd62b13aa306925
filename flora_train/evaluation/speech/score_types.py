"""Types of error rates of speech recognition: error_rates.json, and `speech` in report.json."""

from __future__ import annotations

import unicodedata
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from flora_train.evaluation.result_model import (
    Confidence,
    Count,
    Interval,
    ResultModel,
    Seconds,
    SparseModel,
    Text,
)

Rate = Literal["wer", "wer_normalized", "cer"]
"""Word error rate as written, word error rate of normalised text, character error rate of normalised text."""


class ErrorRate(Interval):
    """(substitutions + deletions + insertions) / units over all clips of a task, and these counts."""

    substitutions: Count
    deletions: Count
    insertions: Count
    units: Count
    """Words or characters of the references."""
    clips: Count


class TranscriptionScore(ResultModel):
    """Error rates of one contender on one task."""

    name: Text
    family: Text
    wer: ErrorRate
    wer_normalized: ErrorRate
    cer: ErrorRate
    ended: dict[Literal["end", "length", "loop"], Count]
    """How transcripts ended -> number of transcripts."""

    def rate(self, name: Rate) -> ErrorRate:
        """One of the three error rates."""
        return {"wer": self.wer, "wer_normalized": self.wer_normalized, "cer": self.cer}[name]


class RateDifference(ResultModel):
    """Error rates of the family `first` minus those of the family `second`, paired by clip."""

    first: Text
    second: Text
    wer: Interval
    wer_normalized: Interval
    cer: Interval

    def rate(self, name: Rate) -> Interval:
        """The difference of one of the three error rates."""
        return {"wer": self.wer, "wer_normalized": self.wer_normalized, "cer": self.cer}[name]


class AlignedPiece(ResultModel):
    """Words of a reference, and the words of a transcript that are aligned with them."""

    kind: Literal["equal", "substitute", "delete", "insert"]
    reference: Text
    transcript: Text


class Utterance(ResultModel):
    """One clip, with the transcripts of the base and of an adapter aligned with its reference."""

    kind: Literal["worst", "most improved"]
    family: Text
    file: Text
    seconds: Seconds
    reference: Text
    base: tuple[AlignedPiece, ...]
    adapter: tuple[AlignedPiece, ...]
    audio: Annotated[Text, Field(pattern=r"^data:audio/")] | None
    """The clip as a data URL, which a page can play."""

    @cached_property
    def direction(self) -> Literal["ltr", "rtl"]:
        """The direction in which the reference is written: that of its first letter."""
        for character in self.reference:
            direction = unicodedata.bidirectional(character)
            if direction in ("L", "R", "AL"):
                return "ltr" if direction == "L" else "rtl"
        return "ltr"


class SpeechLanguage(SparseModel):
    """Error rates on the test clips of one task."""

    written_if_set = ("over_seeds",)

    task: Text
    language: Text
    token: Text
    """The language token that the decoder starts with."""
    normalizer: Text
    metric: Literal["wer_normalized", "cer"]
    """The error rate that counts for this language."""
    clips: Count
    seconds: Seconds
    contenders: Annotated[tuple[TranscriptionScore, ...], Field(min_length=1)]
    over_seeds: tuple[TranscriptionScore, ...] = ()
    """Means, and sums of counts, of adapters that differ in their seed only, under their common name."""
    differences: tuple[RateDifference, ...]
    """Each adapter against the base, and each pair of adapters; of seeds, their means in pairs."""
    utterances: tuple[Utterance, ...]

    @cached_property
    def by_family(self) -> dict[str, TranscriptionScore]:
        """Family -> its error rates."""
        return {contender.family: contender for contender in self.contenders}

    @cached_property
    def to_base(self) -> dict[str, RateDifference]:
        """Family -> difference to the base."""
        return {
            difference.first: difference for difference in self.differences if difference.second == "base"
        }


class SpeechResults(ResultModel):
    """Error rates of base and adapters on all spoken tasks, and how clips were transcribed."""

    beams: Count
    max_new_tokens: Count
    window_step: Seconds | None
    """Clips are padded to a multiple of these seconds; None: to the encoder's full length."""
    confidence: Confidence
    languages: tuple[SpeechLanguage, ...]

    @cached_property
    def families(self) -> list[str]:
        """Families that take part in any language, the base first."""
        families: dict[str, None] = {}
        for part in self.languages:
            families |= dict.fromkeys(part.by_family)
        return list(families)
