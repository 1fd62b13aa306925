"""Error counts: by hand in six scripts, and as jiwer counts a corpus."""

from __future__ import annotations

import math

import jiwer
import numpy as np
import pytest

from flora_train.evaluation.speech.error_rates import aligned, character_errors, word_errors
from flora_train.evaluation.speech.score_types import AlignedPiece
from flora_train.evaluation.speech.transcribe import find_repetition

BY_HAND = [
    ("the cat sat", "the bat sat down", (1, 0, 1, 3)),  # Latin
    ("сайн байна уу", "сайн уу", (0, 1, 0, 3)),  # Cyrillic
    ("मैं हिन्दी बोलता हूँ", "मैं हिनदी बोलता हूँ", (1, 0, 0, 4)),  # Devanagari
    ("السلام عليكم", "عليكم السلام", (0, 1, 1, 2)),  # Arabic: moved
    ("πώς είσαι", "", (0, 2, 0, 2)),  # Greek: nothing heard
    ("今日 は", "今日 は いい", (0, 0, 1, 2)),  # Han and Kana
]


@pytest.mark.parametrize(("said", "heard", "counts"), BY_HAND)
def test_words_by_hand(said: str, heard: str, counts: tuple[int, ...]) -> None:
    found = word_errors([said], [heard])
    s, d, i, n = (
        int(values[0]) for values in (found.substitutions, found.deletions, found.insertions, found.units)
    )
    assert n == counts[3]
    assert s + d + i == sum(counts[:3])
    if (s, d, i) != counts[:3]:  # another best alignment: two substitutions for a move
        assert (s, d, i) == (2, 0, 0)


def test_characters_by_hand() -> None:
    assert character_errors(["น้ำ"], ["นำ"]).record() == {"S": 0, "D": 1, "I": 0, "N": 3, "n": 1}
    assert character_errors(["a b"], ["ab"]).record() == {"S": 0, "D": 1, "I": 0, "N": 3, "n": 1}


def test_a_corpus_is_summed_as_jiwer_does() -> None:
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(12)]
    said = [" ".join(random.choice(words, size=random.integers(1, 12))) for _ in range(60)]
    heard = [" ".join(random.choice(words, size=random.integers(1, 12))) for _ in range(60)]
    found, theirs = word_errors(said, heard), jiwer.process_words(said, heard)
    assert found.rate == pytest.approx(theirs.wer)
    assert found.record() == {
        "S": theirs.substitutions,
        "D": theirs.deletions,
        "I": theirs.insertions,
        "N": sum(map(len, theirs.references)),
        "n": 60,
    }
    characters = jiwer.process_characters(said, heard)
    assert character_errors(said, heard).rate == pytest.approx(characters.cer)


def test_an_empty_reference_counts_insertions() -> None:
    found = word_errors(["", "one two"], ["three words more", "one two"])
    assert found.record() == {"S": 0, "D": 0, "I": 3, "N": 2, "n": 2}
    assert found.rate == 1.5
    assert math.isnan(word_errors([""], [""]).rate)


def test_aligned_returns_pieces_of_reference_and_transcript() -> None:
    assert aligned("a b c", "a x c d") == [
        AlignedPiece(kind="equal", reference="a", transcript="a"),
        AlignedPiece(kind="substitute", reference="b", transcript="x"),
        AlignedPiece(kind="equal", reference="c", transcript="c"),
        AlignedPiece(kind="insert", reference="", transcript="d"),
    ]
    assert aligned("", "noise") == [AlignedPiece(kind="insert", reference="", transcript="noise")]
    assert aligned("a b", "") == [AlignedPiece(kind="delete", reference="a b", transcript="")]


def test_find_repetition_returns_the_position_after_the_first_occurrence() -> None:
    assert find_repetition([9, 8, *[1, 2, 3] * 6]) == 5
    assert find_repetition([9, *[4] * 16]) == 2
    assert find_repetition([7, *range(20), *range(20), *range(20), *range(20)]) == 21
    assert find_repetition([9, *[4] * 15]) is None  # a word may be repeated
    assert find_repetition([1, 2, 3] * 3) is None
    assert find_repetition([*[1, 2, 3] * 8, 9]) is None  # the text went on
    assert find_repetition([]) is None
