"""How far is a transcript from what was said? Substitutions, deletions and insertions, counted by jiwer and summed over a corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Errors:
    """Per utterance, int64 [n]: S, D and I of the best alignment, and N, the units of the reference."""

    substitutions: NDArray[np.int64]
    deletions: NDArray[np.int64]
    insertions: NDArray[np.int64]
    units: NDArray[np.int64]

    @property
    def total(self) -> NDArray[np.int64]:
        """S + D + I."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """(S + D + I) / N over the whole corpus, not a mean of rates: NaN where nothing was said at all. It may exceed 1."""
        units = int(self.units.sum())
        return float(self.total.sum() / units) if units else float("nan")

    def record(self) -> dict[str, int]:
        """The sums, as they are written down."""
        names = {"S": self.substitutions, "D": self.deletions, "I": self.insertions, "N": self.units}
        return {name: int(values.sum()) for name, values in names.items()} | {"n": len(self.units)}


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Errors:
    """By word: what stands between spaces."""
    return _errors(references, hypotheses, str.split)


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Errors:
    """By character (code point), spaces included."""
    return _errors(references, hypotheses, list)


def aligned(reference: str, hypothesis: str) -> list[dict[str, str]]:
    """The best alignment by word, as pieces: kind (equal, substitute, delete, insert), said, heard."""
    import jiwer

    if not reference.split():
        return [{"kind": "insert", "said": "", "heard": hypothesis}] if hypothesis.split() else []
    found = jiwer.process_words(reference, hypothesis)
    said, heard = found.references[0], found.hypotheses[0]
    return [
        {
            "kind": chunk.type,
            "said": " ".join(said[chunk.ref_start_idx : chunk.ref_end_idx]),
            "heard": " ".join(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        }
        for chunk in found.alignments[0]
    ]


def _errors(references: Sequence[str], hypotheses: Sequence[str], split: Callable[[str], list[str]]) -> Errors:
    counts = np.array([_counts(split(r), split(h)) for r, h in zip(references, hypotheses, strict=True)], dtype=np.int64)
    counts = counts.reshape(-1, 4)
    return Errors(*(counts[:, i] for i in range(4)))


def _counts(reference: list[str], hypothesis: list[str]) -> tuple[int, int, int, int]:
    """S, D, I and N of one utterance."""
    import jiwer

    if not reference or not hypothesis:  # nothing said, or nothing heard
        return 0, len(reference), len(hypothesis), len(reference)
    names: dict[str, str] = {}  # units as single letters, so that any unit, a space too, is one
    for unit in (*reference, *hypothesis):
        names.setdefault(unit, chr(0x4E00 + len(names)))
    found: Any = jiwer.process_characters("".join(names[u] for u in reference), "".join(names[u] for u in hypothesis))
    return found.substitutions, found.deletions, found.insertions, len(reference)
