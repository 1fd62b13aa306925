"""The figures that the best states of a task can be selected by: of labels, and of embeddings."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from flora_train.config.errors import Problem, UserError
from flora_train.config.metric_names import is_function
from flora_train.config.schema import RunConfig
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.task import Task
from flora_train.evaluation.figures.entities import are_bio_tags
from flora_train.evaluation.figures.labels import label_statistic_of
from flora_train.evaluation.figures.own_labels import named_targets
from flora_train.evaluation.figures.own_metric import import_own_metric, lower_is_better, own_value
from flora_train.evaluation.figures.predictions import LabelPredictions, Targets
from flora_train.evaluation.figures.statistic import values_of
from flora_train.evaluation.figures.texts import FIGURES
from flora_train.training.choice_scores import ChoiceScores
from flora_train.training.heldout import HeldOut
from flora_train.training.selection import Evaluated, Selection

logger = logging.getLogger(__name__)


def selections_of(config: RunConfig, tasks: Mapping[str, Task]) -> dict[str, Selection]:
    """Task -> its selection, of the tasks with `select_by`. Raises UserError for figures that the labels of a
    task do not have, and for functions that cannot be imported."""
    selections: dict[str, Selection] = {}
    problems: list[Problem] = []
    for name, task in tasks.items():
        figure = config.tasks[name].select_by
        if figure is None:
            continue
        if figure == "entity_f1" and not are_bio_tags(task.labels or ()):
            hint = "is of tags such as B-PER and I-PER, and the labels of this task are others: use another"
            problems.append(Problem(f"tasks.{name}.select_by", figure, hint))
            continue
        try:
            selections[name] = _selection(name, figure, task)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return selections


def _selection(name: str, figure: str, task: Task) -> Selection:
    if task.embedding is not None:
        return Selection(figure, False, partial(_of_embeddings, figure))
    of_words = isinstance(task.validation, ChoiceSplit)
    if not is_function(figure):
        measure = partial(_figure_of_labels, figure)
        return Selection(figure, FIGURES[figure].lower_is_better, measure, of_words)
    function = import_own_metric(figure, f"tasks.{name}.select_by")
    return Selection(figure, lower_is_better(function), partial(_own_figure, function), of_words)


def _of_embeddings(figure: str, results: Evaluated, adapter: int) -> float:
    assert isinstance(results, HeldOut)
    assert results.embeddings is not None
    return results.embeddings.metrics(adapter)[figure]


def _figure_of_labels(figure: str, results: Evaluated, adapter: int) -> float:
    spec, predictions, references = _predictions(results, adapter)
    values = values_of(label_statistic_of(spec, predictions, references), len(references))
    value = values.get(figure)
    return np.nan if value is None else value


def _own_figure(function: Any, results: Evaluated, adapter: int) -> float:
    """NaN where the function fails, which a warning says: such a state is selected only if no other one has a
    value."""
    spec, predictions, references = _predictions(results, adapter)
    named = (named_targets(spec, targets, references) for targets in (predictions.targets, references))
    try:
        return own_value(function, *named)
    except ValueError as error:
        logger.warning("the function of select_by %s: the state counts as the worst", error)
        return np.nan


def _predictions(results: Evaluated, adapter: int) -> tuple[LabelSpec, LabelPredictions, Targets]:
    """The labels of a task, what an adapter predicts, and the references."""
    if isinstance(results, ChoiceScores):
        scores = results.probabilities(adapter)
        return results.spec, LabelPredictions(results.predictions(adapter), scores), results.references
    labels = results.labels
    assert labels is not None
    predictions = LabelPredictions(labels.predicted(adapter), labels.scores(adapter))
    references: Sequence[Any] = labels.targets
    return labels.spec, predictions, references
