"""Figures of labels, numbers and tags equal scikit-learn's, scipy's and seqeval's, on resamples too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import scipy.stats
import seqeval.metrics
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from flora_train.evaluation.figures.classification import (
    accuracy,
    balanced_accuracy,
    confusion_matrix,
    label_statistic,
    macro_f1,
    mcc,
    multi_label_figures,
    multi_label_statistic,
    token_figures,
    token_statistic,
    weighted_f1,
)
from flora_train.evaluation.figures.entities import are_bio_tags, entity_f1, entity_statistic
from flora_train.evaluation.figures.ranking import (
    auroc,
    auroc_multi_label,
    auroc_one_vs_rest,
    auroc_statistic,
    multi_label_auroc_statistic,
    one_vs_rest_statistic,
)
from flora_train.evaluation.figures.regression import regression_figures, regression_statistic
from flora_train.evaluation.figures.statistic import Statistic

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "I-X", "E-LOC", "S-X", "B", "I")


def quiet(function: Callable[..., Any], *arguments: Any, **options: Any) -> float | None:
    """What another library returns, without its warnings; None for NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(function(*arguments, **options))
    return None if np.isnan(value) else value


def same(ours: float | None, theirs: float | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def label_pairs(labels: st.SearchStrategy[Any]) -> st.SearchStrategy[list[tuple[Any, Any]]]:
    return st.lists(st.tuples(labels, labels), min_size=1, max_size=40)


def resampled(statistic: Statistic, n: int, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """The figures of one resample, and the examples that it consists of."""
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n)).astype(float)
    with np.errstate(all="ignore"):
        values = statistic(np.stack([np.ones(n), weights]))
    drawn = np.repeat(np.arange(n), weights.astype(int))
    return {name: float(vector[1]) for name, vector in values.items()}, drawn


SKLEARN: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": sklearn.metrics.accuracy_score,
    "balanced_accuracy": sklearn.metrics.balanced_accuracy_score,
    "macro_f1": lambda y, p: sklearn.metrics.f1_score(y, p, average="macro", zero_division=0),
    "weighted_f1": lambda y, p: sklearn.metrics.f1_score(y, p, average="weighted", zero_division=0),
    "mcc": sklearn.metrics.matthews_corrcoef,
}


@given(label_pairs(st.sampled_from(["a", "b", "ž", "", "long name"])) | label_pairs(st.integers(-1, 3)))
def test_single_labels(pairs: list[tuple[Any, Any]]) -> None:
    predictions, references = map(list, zip(*pairs, strict=True))
    ours = {
        "accuracy": accuracy(predictions, references),
        "balanced_accuracy": balanced_accuracy(predictions, references),
        "macro_f1": macro_f1(predictions, references),
        "weighted_f1": weighted_f1(predictions, references),
        "mcc": mcc(predictions, references),
    }
    for name, theirs in SKLEARN.items():
        assert same(ours[name], quiet(theirs, references, predictions)), name
    values, drawn = resampled(label_statistic(predictions, references), len(pairs), len(pairs))
    again = [references[i] for i in drawn], [predictions[i] for i in drawn]
    for name, theirs in SKLEARN.items():
        assert same(values[name], quiet(theirs, *again)), f"{name} of a resample"
    labels = sorted({*predictions, *references})
    expected = sklearn.metrics.confusion_matrix(references, predictions, labels=labels)
    assert (confusion_matrix(predictions, references, labels) == expected).all()


@pytest.mark.parametrize("examples", [2, 7, 60])
@pytest.mark.parametrize("grid", [1, 3, 1000], ids=["all equal", "ties", "distinct"])
def test_areas(examples: int, grid: int) -> None:
    generator = np.random.default_rng(examples * grid)
    for seed in range(20):
        scores = generator.integers(0, grid, examples) / grid
        positive = generator.integers(0, 2, examples)
        expected = quiet(sklearn.metrics.roc_auc_score, positive, scores)
        assert same(auroc(scores, positive), expected)
        if expected is not None:
            values, drawn = resampled(auroc_statistic(scores, positive), examples, seed)
            theirs = quiet(sklearn.metrics.roc_auc_score, positive[drawn], scores[drawn])
            assert same(None if np.isnan(values["auroc"]) else values["auroc"], theirs)


@pytest.mark.parametrize("classes", [3, 5])
def test_areas_of_several_classes(classes: int) -> None:
    generator = np.random.default_rng(classes)
    undefined = 0
    for seed in range(40):
        n = int(generator.integers(2, 40))
        scores = generator.dirichlet(np.ones(classes), n).round(1) + 0.01
        scores /= scores.sum(axis=1, keepdims=True)
        references = generator.integers(0, classes, n)
        expected = quiet(
            sklearn.metrics.roc_auc_score, references, scores, multi_class="ovr", labels=range(classes)
        )
        assert same(auroc_one_vs_rest(scores, references), expected)
        undefined += expected is None
        values, drawn = resampled(one_vs_rest_statistic(scores, references), n, seed)
        if expected is not None and len(set(references[drawn])) == classes:
            theirs = quiet(sklearn.metrics.roc_auc_score, references[drawn], scores[drawn], multi_class="ovr")
            assert same(values["auroc"], theirs)
    assert undefined


def test_areas_of_several_labels() -> None:
    generator = np.random.default_rng(3)
    undefined = 0
    for seed in range(40):
        n = int(generator.integers(2, 30))
        scores = generator.normal(size=(n, 3)).round(1)
        references = generator.integers(0, 2, (n, 3))
        expected = quiet(sklearn.metrics.roc_auc_score, references, scores, average="macro")
        assert same(auroc_multi_label(scores, references), expected)
        undefined += expected is None
        values, drawn = resampled(multi_label_auroc_statistic(scores, references), n, seed)
        theirs = quiet(sklearn.metrics.roc_auc_score, references[drawn], scores[drawn], average="macro")
        if expected is not None and theirs is not None:
            assert same(values["auroc"], theirs)
    assert undefined


def test_several_labels() -> None:
    generator = np.random.default_rng(0)
    f1 = sklearn.metrics.f1_score
    for seed in range(60):
        n, labels = int(generator.integers(1, 12)), int(generator.integers(2, 5))
        share = generator.choice([0.0, 0.2, 0.6, 1.0])
        predictions = generator.random((n, labels)) < share
        references = generator.random((n, labels)) < 0.3
        values, drawn = resampled(multi_label_statistic(predictions, references), n, seed)
        for ours, p, y in (
            (multi_label_figures(predictions, references), predictions, references),
            (values, predictions[drawn], references[drawn]),
        ):
            assert same(ours["micro_f1"], quiet(f1, y, p, average="micro", zero_division=0))
            assert same(ours["macro_f1"], quiet(f1, y, p, average="macro", zero_division=0))
            assert same(ours["subset_accuracy"], quiet(sklearn.metrics.accuracy_score, y, p))


numbers = st.integers(-3, 3).map(float) | st.floats(-1e3, 1e3).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30))
def test_regression(pairs: list[tuple[float, float]]) -> None:
    predictions, references = (np.array(side) for side in zip(*pairs, strict=True))
    values, drawn = resampled(regression_statistic(predictions, references), len(pairs), len(pairs))
    compare_regression(regression_figures(predictions, references), predictions, references)
    defined = {name: None if np.isnan(value) else value for name, value in values.items()}
    compare_regression(defined, predictions[drawn], references[drawn])


def compare_regression(ours: dict[str, float | None], p: np.ndarray, y: np.ndarray) -> None:
    assert same(ours["mse"], sklearn.metrics.mean_squared_error(y, p))
    assert same(ours["mae"], sklearn.metrics.mean_absolute_error(y, p))
    if len(y) == 1:
        assert ours["r2"] is ours["pearson"] is ours["spearman"] is None
        return
    # scikit-learn's own sums of equal numbers need not be exact
    r2 = quiet(sklearn.metrics.r2_score, y, p)
    if (y == y[0]).all():
        r2 = float((p == y).all())
    assert ours["r2"] == pytest.approx(r2, rel=1e-6, abs=1e-9)
    if (y == y[0]).all() or (p == p[0]).all():
        assert ours["pearson"] is ours["spearman"] is None
        return
    pearson = quiet(lambda: scipy.stats.pearsonr(p, y).statistic)
    spearman = quiet(lambda: scipy.stats.spearmanr(p, y).statistic)
    assert ours["pearson"] == pytest.approx(pearson, rel=1e-6, abs=1e-9)
    assert ours["spearman"] == pytest.approx(spearman, rel=1e-6, abs=1e-9)


def test_regression_without_figures() -> None:
    assert regression_figures([], []) == {}
    assert set(regression_figures([1.0, np.nan], [1.0, 2.0]).values()) == {None}
    constant = regression_figures([0.1, 0.1, 0.1], [0.1, 0.1, 0.1])
    assert (constant["r2"], constant["pearson"], constant["spearman"]) == (1.0, None, None)
    assert regression_figures([0.2, 0.1, 0.1], [0.1, 0.1, 0.1])["r2"] == 0.0


tagged = st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), max_size=12)


@given(st.lists(tagged, min_size=1, max_size=8))
def test_entities(texts: list[list[tuple[str, str]]]) -> None:
    predictions = [[p for p, _ in text] for text in texts]
    references = [[y for _, y in text] for text in texts]
    theirs = quiet(seqeval.metrics.f1_score, references, predictions, zero_division=0)
    assert same(entity_f1(predictions, references), theirs)
    values, drawn = resampled(entity_statistic(predictions, references), len(texts), len(texts))
    again = [references[i] for i in drawn], [predictions[i] for i in drawn]
    assert same(values["entity_f1"], quiet(seqeval.metrics.f1_score, *again, zero_division=0))


@given(st.lists(tagged, min_size=1, max_size=8))
def test_tokens(texts: list[list[tuple[str, str]]]) -> None:
    predictions = [[p for p, _ in text] for text in texts]
    references = [[y for _, y in text] for text in texts]
    flat_p, flat_y = list(chain(*predictions)), list(chain(*references))
    ours = token_figures(predictions, references)
    if not flat_y:
        assert set(ours.values()) == {None}
        return
    assert same(ours["token_accuracy"], sklearn.metrics.accuracy_score(flat_y, flat_p))
    assert same(ours["token_macro_f1"], quiet(SKLEARN["macro_f1"], flat_y, flat_p))
    values, drawn = resampled(token_statistic(predictions, references), len(texts), len(texts))
    flat_y = list(chain(*(references[i] for i in drawn)))
    flat_p = list(chain(*(predictions[i] for i in drawn)))
    if flat_y:
        assert same(values["token_macro_f1"], quiet(SKLEARN["macro_f1"], flat_y, flat_p))


def test_nothing_and_not_finite() -> None:
    assert accuracy([], []) is balanced_accuracy([], []) is mcc([], []) is macro_f1([], []) is None
    assert auroc([], []) is auroc([np.nan, 1.0], [0, 1]) is auroc([0.1, 0.2], [1, 1]) is None
    assert auroc_one_vs_rest([[0.5, np.inf], [1, 0]], [0, 1]) is None
    assert auroc_multi_label([], []) is entity_f1([], []) is None
    assert multi_label_figures([], []) == token_figures([], []) == {}
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        accuracy(["a"], ["a", "b"])


def test_tags_of_entities_are_recognised() -> None:
    assert are_bio_tags(["O", "B-PER", "I-PER"])
    assert are_bio_tags(["B", "I", "O"])
    assert not are_bio_tags(["O"])
    assert not are_bio_tags(["NOUN", "VERB", "O"])
    assert not are_bio_tags(["B-PER", "VERB"])
