"""Figures of generated texts that need no other package: exact match and ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flora_train.evaluation.figures.statistic import Statistic, check_lengths, mean_statistic, single_value

Texts = Sequence[str]
WORD = re.compile(r"[a-z0-9]+")


def exact_match(predictions: Texts, references: Texts) -> float | None:
    """Share of texts that equal their reference; None without examples."""
    return single_value(exact_match_statistic(predictions, references), len(references))


def rouge_l(predictions: Texts, references: Texts) -> float | None:
    """Mean ROUGE-L (F-measure) of the texts; None without examples."""
    return single_value(rouge_l_statistic(predictions, references), len(references))


def exact_match_statistic(predictions: Texts, references: Texts) -> Statistic:
    """`exact_match`."""
    check_lengths(predictions, references)
    matches = [predicted == true for predicted, true in zip(predictions, references, strict=True)]
    return mean_statistic("exact_match", matches)


def rouge_l_statistic(predictions: Texts, references: Texts) -> Statistic:
    """`rouge_l`."""
    check_lengths(predictions, references)
    values = [rouge_l_of(predicted, true) for predicted, true in zip(predictions, references, strict=True)]
    return mean_statistic("rouge_l", values)


def rouge_l_of(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, as rouge_score computes it without a stemmer.

    Words consist of a-z and 0-9 in lower case; all other characters separate them.
    """
    predicted, true = WORD.findall(prediction.lower()), WORD.findall(reference.lower())
    if not predicted or not true:
        return 0.0
    common = _common_subsequence(predicted, true)
    precision, recall = common / len(predicted), common / len(true)
    if not common:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004. A bit of `row` is 0 where the
    length grows by one.
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << i
    everything = (1 << len(first)) - 1
    row = everything
    for word in second:
        matches = row & positions.get(word, 0)
        row = (row + matches | row - matches) & everything
    return len(first) - row.bit_count()
