"""Word and character errors of transcripts, counted by jiwer and summed over a corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.evaluation.speech.score_types import AlignedPiece


@dataclass(frozen=True)
class Errors:
    """Errors per utterance in the best alignment, int64 [n] each."""

    substitutions: NDArray[np.int64]
    deletions: NDArray[np.int64]
    insertions: NDArray[np.int64]
    units: NDArray[np.int64]
    """Words or characters of the reference."""

    @property
    def total(self) -> NDArray[np.int64]:
        """S + D + I."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """(S + D + I) / N over the whole corpus, not a mean of rates.

        It may exceed 1, and is NaN without any units.
        """
        units = int(self.units.sum())
        if not units:
            return float("nan")
        return float(self.total.sum() / units)

    def record(self) -> dict[str, int]:
        """The sums, as they are written down."""
        names = {"S": self.substitutions, "D": self.deletions, "I": self.insertions, "N": self.units}
        return {name: int(values.sum()) for name, values in names.items()} | {"n": len(self.units)}


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Errors:
    """Errors by word; words are separated by spaces."""
    return _errors(references, hypotheses, str.split)


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Errors:
    """Errors by character (code point), including spaces."""
    return _errors(references, hypotheses, list)


def aligned(reference: str, hypothesis: str) -> list[AlignedPiece]:
    """The best alignment by word, as pieces."""
    import jiwer

    if not reference.split():
        return (
            [AlignedPiece(kind="insert", reference="", transcript=hypothesis)] if hypothesis.split() else []
        )
    alignment = jiwer.process_words(reference, hypothesis)
    reference_words, transcript_words = alignment.references[0], alignment.hypotheses[0]
    return [
        AlignedPiece(
            kind=chunk.type,
            reference=" ".join(reference_words[chunk.ref_start_idx : chunk.ref_end_idx]),
            transcript=" ".join(transcript_words[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in alignment.alignments[0]
    ]


def _errors(
    references: Sequence[str], hypotheses: Sequence[str], split: Callable[[str], list[str]]
) -> Errors:
    pairs = zip(references, hypotheses, strict=True)
    counts = np.array(
        [_counts(split(reference), split(hypothesis)) for reference, hypothesis in pairs], dtype=np.int64
    )
    return Errors(*counts.reshape(-1, 4).T)


def _counts(reference: list[str], hypothesis: list[str]) -> tuple[int, int, int, int]:
    """S, D, I and N of one utterance."""
    import jiwer

    if not reference or not hypothesis:  # jiwer refuses empty texts
        return 0, len(reference), len(hypothesis), len(reference)
    letters: dict[
        str, str
    ] = {}  # one letter for each distinct unit, as jiwer would split or strip some units
    for unit in (*reference, *hypothesis):
        letters.setdefault(unit, chr(0x4E00 + len(letters)))
    encoded = ["".join(map(letters.__getitem__, units)) for units in (reference, hypothesis)]
    alignment: Any = jiwer.process_characters(*encoded)
    return alignment.substitutions, alignment.deletions, alignment.insertions, len(reference)
