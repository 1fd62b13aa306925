"""Functions of the user's own on predicted labels: tried before training, and resampled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from flora_train.adapters.spec import BASE_ID
from flora_train.config.errors import Problem, UserError
from flora_train.config.schema import RunConfig
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.labels.split import LabelSplit
from flora_train.data.task import Task
from flora_train.evaluation.figures.intervals import (
    Contenders,
    FigureComparison,
    Resampling,
    resampled_figures,
)
from flora_train.evaluation.figures.own_metric import (
    import_own_metric,
    lower_is_better,
    own_statistic,
    try_own_metric,
)
from flora_train.evaluation.figures.predictions import UNLABELLED, LabelPredictions, LabelSpecLike, Targets
from flora_train.evaluation.figures.result_types import FigureResult
from flora_train.evaluation.figures.statistic import Statistic

MOST_TRIED = 1000
"""Held-out examples that a function is called with before training."""

logger = logging.getLogger(__name__)


def check_label_metrics(config: RunConfig, tasks: Mapping[str, Task]) -> None:
    """Raises one UserError with the functions that give no number for held-out labels and other predictions,
    which are the labels of other examples."""
    problems: list[Problem] = []
    for name, task in tasks.items():
        for own_key, metric in config.tasks[name].label_functions:
            key = f"tasks.{name}.{own_key}"
            try:
                spec, references = _held_out(task)
                predictions = _shifted(spec, references)
                function = import_own_metric(metric, key)
                try_own_metric(
                    function, predictions, references, metric=metric, key=key, examples="held-out labels"
                )
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)


def named_targets(spec: LabelSpecLike, targets: Targets, references: Targets) -> list[Any]:
    """What a function is called with: for each example its label, the list of its labels, its number, or the
    list of the labels of those of its tokens that have one."""
    if spec.task_type == "regression":
        return [float(value) for value in targets]
    if spec.task_type == "single":
        return [spec.labels[int(label)] for label in targets]
    if spec.task_type == "multi":
        return [_labels_of(spec.labels, flags) for flags in targets]
    pairs = zip(targets, references, strict=True)
    return [_tags_of(spec.labels, tokens, expected) for tokens, expected in pairs]


def own_label_figures(
    task: str,
    spec: LabelSpecLike,
    metrics: Sequence[str],
    predictions: Mapping[int, LabelPredictions],
    references: Targets,
    *,
    contenders: Contenders,
    resampling: Resampling,
) -> tuple[list[FigureResult], list[str]]:
    """The figures of functions, and sentences on those that fail.

    predictions: contender id -> its predictions, of base, adapters and baselines; contenders: of all of them.
    """
    figures: list[FigureResult] = []
    notes: list[str] = []
    expected = named_targets(spec, references, references)
    named = {i: named_targets(spec, given.targets, references) for i, given in predictions.items()}
    for metric in metrics:
        try:
            statistics, lower = _statistics(metric, f"tasks.{task}.metrics", named, expected)
        except (ValueError, UserError) as error:
            notes.append(f"{metric} of the labels of {task}: it {error}.")
            logger.warning("tasks.%s.metrics = %s: %s", task, metric, error)
            continue
        n = len(references)
        resampled = resampled_figures(statistics, n, samples=resampling.samples, seed=resampling.seed)
        comparison = FigureComparison(
            task, resampled, contenders, examples=n, confidence=resampling.confidence
        )
        figures.append(comparison.result(metric, lower))
    return figures, notes


def _statistics(
    metric: str, key: str, predictions: Mapping[int, list[Any]], references: list[Any]
) -> tuple[dict[int, Statistic], bool]:
    """The statistic of each contender, and whether lower values are better. Baselines for which the function
    gives no number are left out. Raises ValueError or UserError if it gives none for another contender."""
    function = import_own_metric(metric, key)
    statistics: dict[int, Statistic] = {}
    for contender, predicted in predictions.items():
        try:
            statistics[contender] = own_statistic(function, metric, predicted, references)
        except ValueError:
            if contender >= BASE_ID:
                raise
    return statistics, lower_is_better(function)


def _labels_of(labels: Sequence[str], flags: Sequence[float]) -> list[str]:
    return [label for label, flag in zip(labels, flags, strict=True) if flag > 0]


def _tags_of(labels: Sequence[str], tokens: Sequence[int], expected: Sequence[int]) -> list[str]:
    pairs = zip(tokens, expected, strict=True)
    return [labels[int(label)] for label, own in pairs if own != UNLABELLED]


def _held_out(task: Task) -> tuple[LabelSpec, list[Any]]:
    """The labels of a task, and the first held-out ones as a function is called with them."""
    split = task.evaluated
    if isinstance(split, ChoiceSplit):
        spec, references = LabelSpec("single", split.label_names), list[Any](split.references[:MOST_TRIED])
    else:
        assert isinstance(split, LabelSplit)
        spec, references = split.spec, [split.target(i) for i in range(min(len(split), MOST_TRIED))]
    return spec, named_targets(spec, references, references)


def _shifted(spec: LabelSpecLike, references: list[Any]) -> list[Any]:
    """For each example the label of the next one; for each token that of the next one of its text."""
    if spec.task_type == "tokens":
        return [[*tags[1:], *tags[:1]] for tags in references]
    return [*references[1:], *references[:1]]
