"""Figures of generated texts equal those of rouge_score and sacrebleu, on resamples too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from flora_train.evaluation.figures.overlap import exact_match, rouge_l, rouge_l_of
from flora_train.evaluation.figures.sacrebleu_scores import bleu, bleu_statistic, chrf, chrf_statistic
from flora_train.evaluation.figures.statistic import Statistic

WORDS = ("the", "cat", "sat", "on", "a", "mat", ",", "The", "cat's", "42", "čtyřicet", "猫", "-", "x_y", "\n")
texts = st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join) | st.text(max_size=30)
text_pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=12)


@given(text_pairs)
def test_rouge_l(pairs: list[tuple[str, str]]) -> None:
    scorer = RougeScorer(["rougeL"])
    theirs = [scorer.score(target=y, prediction=p)["rougeL"].fmeasure for p, y in pairs]
    assert [rouge_l_of(p, y) for p, y in pairs] == pytest.approx(theirs, abs=1e-12)
    predictions, references = zip(*pairs, strict=True)
    assert rouge_l(predictions, references) == pytest.approx(np.mean(theirs), abs=1e-12)
    assert exact_match(predictions, references) == np.mean([p == y for p, y in pairs])


@given(text_pairs)
def test_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    predictions, references = map(list, zip(*pairs, strict=True))
    assert bleu(predictions, references) == pytest.approx(corpus(BLEU(), predictions, references), rel=1e-9)
    assert chrf(predictions, references) == pytest.approx(corpus(CHRF(), predictions, references), rel=1e-9)
    assert resample(bleu_statistic(predictions, references), pairs, BLEU())
    assert resample(chrf_statistic(predictions, references), pairs, CHRF())


def corpus(metric: BLEU | CHRF, predictions: list[str], references: list[str]) -> float:
    return metric.corpus_score(predictions, [references]).score


def resample(statistic: Statistic, pairs: list[tuple[str, str]], metric: BLEU | CHRF) -> bool:
    """Whether a resample has the score that sacrebleu gives to its examples."""
    n = len(pairs)
    weights = np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), size=3).astype(float)
    (values,) = statistic(weights).values()
    for value, row in zip(values, weights.astype(int), strict=True):
        drawn = [pairs[i] for i in np.repeat(np.arange(n), row)]
        predictions, references = map(list, zip(*drawn, strict=True))
        assert value == pytest.approx(corpus(metric, predictions, references), rel=1e-9)
    return True


def test_nothing() -> None:
    assert exact_match([], []) is rouge_l([], []) is bleu([], []) is chrf([], []) is None
    assert bleu(["", ""], ["a b c d", ""]) == chrf(["", ""], ["a", ""]) == rouge_l([""], [""]) == 0.0
    assert exact_match([""], [""]) == 1.0
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        rouge_l(["a", "b"], ["a"])
