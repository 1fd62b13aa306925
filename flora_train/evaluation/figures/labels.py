"""Figures of tasks of labels: of base, adapters and baselines, with a confusion matrix of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flora_train.evaluation.figures.classification import (
    confusion_matrix,
    label_statistic,
    multi_label_statistic,
    token_statistic,
)
from flora_train.evaluation.figures.entities import are_bio_tags, entity_statistic
from flora_train.evaluation.figures.intervals import (
    Contenders,
    FigureComparison,
    Resampling,
    resampled_figures,
)
from flora_train.evaluation.figures.own_labels import own_label_figures
from flora_train.evaluation.figures.predictions import UNLABELLED, LabelPredictions, LabelSpecLike, Targets
from flora_train.evaluation.figures.ranking import (
    auroc_statistic,
    multi_label_auroc_statistic,
    one_vs_rest_statistic,
)
from flora_train.evaluation.figures.regression import regression_statistic
from flora_train.evaluation.figures.result_types import ConfusionMatrix, FigureResult
from flora_train.evaluation.figures.statistic import Statistic, combined
from flora_train.evaluation.figures.texts import FIGURES

MOST_LABELS = 200
"""Labels up to which a confusion matrix is written."""
FIRST_BASELINE = -2
MAJORITY = {
    "single": "majority label",
    "multi": "majority of each label",
    "regression": "mean",
    "tokens": "majority label",
}
"""Type of a task -> name of the baseline that predicts the same for every example."""


@dataclass(frozen=True)
class LabelFigures:
    """The figures of a task of labels."""

    figures: list[FigureResult]
    confusions: list[ConfusionMatrix]
    """Of base and adapters, where each example has one label."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what could not be measured."""


def label_figures(
    task: str,
    spec: LabelSpecLike,
    predictions: Mapping[int, LabelPredictions],
    references: Targets,
    *,
    contenders: Contenders,
    resampling: Resampling,
    training: Targets | None = None,
    baselines: Mapping[str, LabelPredictions] | None = None,
    metrics: Sequence[str] = (),
) -> LabelFigures:
    """The figures of a task, with paired intervals over its held-out examples.

    Args:
        task: Its name.
        spec: Type of the task and names of the labels.
        predictions: Contender id -> its predictions; -1 is the base, which may be missing.
        references: The targets of the held-out examples.
        contenders: Names of the contenders, and groups of seeds.
        resampling: Settings of the bootstrap.
        training: Targets of the training examples, from which the baseline takes the most frequent label, or
            the mean. None: those of the references.
        baselines: Name -> predictions of further baselines, such as a bag of words.
        metrics: Functions of the user's own, as module:function.

    Returns:
        A result for each figure of the task's type that all contenders have, then for each function; nothing
        without examples. The first baseline predicts the same for every example.
    """
    if not len(references) or not predictions:
        return LabelFigures([], [])
    constant = _constant(spec, references if training is None else training, references)
    named = {MAJORITY[spec.task_type]: constant, **(baselines or {})}
    ids = {FIRST_BASELINE - i: name for i, name in enumerate(named)}
    statistics = {i: label_statistic_of(spec, given, references) for i, given in predictions.items()}
    statistics |= {i: label_statistic_of(spec, named[name], references) for i, name in ids.items()}
    n = len(references)
    figures = resampled_figures(statistics, n, samples=resampling.samples, seed=resampling.seed)
    compared = Contenders(contenders.names, contenders.groups, ids)
    comparison = FigureComparison(task, figures, compared, examples=n, confidence=resampling.confidence)
    first = figures[next(iter(predictions))]
    shared = [name for name in first if all(name in figures[i] for i in predictions)]
    own, notes = own_label_figures(
        task,
        spec,
        metrics,
        {**predictions, **{i: named[name] for i, name in ids.items()}},
        references,
        contenders=compared,
        resampling=resampling,
    )
    return LabelFigures(
        figures=[*(comparison.result(name, FIGURES[name].lower_is_better) for name in shared), *own],
        confusions=_confusions(task, spec, predictions, references, contenders=contenders),
        notes=notes,
    )


def label_statistic_of(spec: LabelSpecLike, predictions: LabelPredictions, references: Targets) -> Statistic:
    """The figures of predictions, by the type of the task."""
    targets, scores = predictions.targets, predictions.scores
    if spec.task_type == "regression":
        return regression_statistic(targets, references)
    if spec.task_type == "tokens":
        return _token_statistic(spec.labels, targets, references)
    statistics: list[Statistic] = []
    if spec.task_type == "single":
        statistics.append(label_statistic(targets, references))
        if scores is not None and len(spec.labels) == 2:
            statistics.append(auroc_statistic(scores[:, 1], np.asarray(references) == 1))
        elif scores is not None:
            statistics.append(one_vs_rest_statistic(scores, references))
    else:
        statistics.append(multi_label_statistic(targets, references))
        if scores is not None:
            statistics.append(multi_label_auroc_statistic(scores, references))
    return combined(statistics)


def _token_statistic(labels: Sequence[str], predictions: Targets, references: Targets) -> Statistic:
    predicted, true = [], []
    for tokens, expected in zip(predictions, references, strict=True):
        pairs = zip(tokens, expected, strict=True)
        labelled = [(labels[int(p)], labels[int(y)]) for p, y in pairs if y != UNLABELLED]
        predicted.append([p for p, _ in labelled])
        true.append([y for _, y in labelled])
    statistics = [token_statistic(predicted, true)]
    if are_bio_tags(labels):
        statistics.append(entity_statistic(predicted, true))
    return combined(statistics)


def _constant(spec: LabelSpecLike, training: Targets, references: Targets) -> LabelPredictions:
    """Predictions that are the same for every example: the most frequent label, or the mean."""
    n = len(references)
    if spec.task_type == "regression":
        return LabelPredictions(np.full(n, np.mean(np.asarray(training, dtype=np.float64))))
    if spec.task_type == "multi":
        shares = np.asarray(training, dtype=np.float64).mean(axis=0)
        return LabelPredictions(np.tile((shares > 0.5).astype(np.float64), (n, 1)))
    if spec.task_type == "single":
        return LabelPredictions(np.full(n, _most_frequent(training)))
    label = _most_frequent([label for tokens in training for label in tokens if label != UNLABELLED])
    return LabelPredictions([[label] * len(tokens) for tokens in references])


def _most_frequent(labels: Targets) -> int:
    """The most frequent label, the first of several; 0 if there are none."""
    if not len(labels):
        return 0
    return int(np.bincount(np.asarray(labels, dtype=np.int64)).argmax())


def _confusions(
    task: str,
    spec: LabelSpecLike,
    predictions: Mapping[int, LabelPredictions],
    references: Targets,
    *,
    contenders: Contenders,
) -> list[ConfusionMatrix]:
    if spec.task_type != "single" or len(spec.labels) > MOST_LABELS:
        return []
    matrices = []
    for contender, given in predictions.items():
        counts = confusion_matrix(given.targets, references, range(len(spec.labels)))
        family = contenders.names[contender].family
        matrices.append(ConfusionMatrix(task=task, family=family, labels=spec.labels, counts=counts.tolist()))
    return matrices
