"""BLEU and chrF of generated texts, computed by sacrebleu (the extra `text-metrics`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flora_train.evaluation.figures.statistic import Matrix, Statistic, Vector, check_lengths, single_value

Texts = Sequence[str]

ORDERS = 4
"""N-grams of BLEU."""
BETA = 2
"""Weight of recall in chrF, relative to precision."""


def bleu(predictions: Texts, references: Texts) -> float | None:
    """Corpus BLEU of sacrebleu's defaults (tokenizer 13a, exponential smoothing), 0 to 100; None without
    examples."""
    return single_value(bleu_statistic(predictions, references), check_lengths(predictions, references))


def chrf(predictions: Texts, references: Texts) -> float | None:
    """Corpus chrF2 of sacrebleu's defaults (6 characters, no words), 0 to 100; None without examples."""
    return single_value(chrf_statistic(predictions, references), check_lengths(predictions, references))


def bleu_statistic(predictions: Texts, references: Texts) -> Statistic:
    """`bleu`. Raises ImportError without sacrebleu."""
    from sacrebleu.metrics import BLEU

    counts = _segment_counts(BLEU(force=True), predictions, references)
    return lambda weights: {"bleu": bleu_of_counts(weights @ counts)}


def chrf_statistic(predictions: Texts, references: Texts) -> Statistic:
    """`chrf`. Raises ImportError without sacrebleu."""
    from sacrebleu.metrics import CHRF

    counts = _segment_counts(CHRF(), predictions, references)
    return lambda weights: {"chrf": chrf_of_counts(weights @ counts)}


def bleu_of_counts(counts: Matrix) -> Vector:
    """BLEU of sacrebleu's counts [R, 10]: lengths of predictions and references, right and all n-grams."""
    length, reference_length = counts[:, 0], counts[:, 1]
    right, total = counts[:, 2 : 2 + ORDERS], counts[:, 2 + ORDERS :]
    log_precisions = np.zeros(len(counts))
    smoothing = np.ones(len(counts))
    with np.errstate(divide="ignore", invalid="ignore"):
        for order in range(ORDERS):
            nothing_right = right[:, order] == 0
            smoothing = np.where(nothing_right, 2 * smoothing, smoothing)
            matches = np.where(nothing_right, 1 / smoothing, right[:, order])
            # without n-grams of this order there are none of higher ones, and the score is 0
            log_precisions += np.where(total[:, order] > 0, np.log(matches / total[:, order]), -np.inf)
        shortness = np.where(length > 0, np.exp(np.minimum(0.0, 1 - reference_length / length)), 0.0)
        score = 100 * shortness * np.exp(log_precisions / ORDERS)
    return np.where(right.any(axis=1), score, 0.0)


def chrf_of_counts(counts: Matrix) -> Vector:
    """chrF of sacrebleu's counts [R, 18]: for each order the n-grams of predictions, of references, and of
    both."""
    predicted, true, common = (counts[:, i::3] for i in range(3))
    both = (predicted > 0) & (true > 0)
    orders = np.maximum(both.sum(axis=1), 1)
    precision = (common / np.where(both, predicted, 1) * both).sum(axis=1) / orders
    recall = (common / np.where(both, true, 1) * both).sum(axis=1) / orders
    scale = BETA**2 * precision + recall
    score = 100 * (1 + BETA**2) * precision * recall
    return np.divide(score, scale, out=np.zeros(len(counts)), where=scale > 0)


def _segment_counts(metric: Any, predictions: Texts, references: Texts) -> Matrix:
    """What sacrebleu counts in each text, whose sums give its score."""
    check_lengths(predictions, references)
    counts = metric._extract_corpus_statistics(list(predictions), [list(references)])
    if not counts:
        return np.zeros((0, 1))
    return np.asarray(counts, dtype=np.float64)
