"""The labels of a task after its rows were read: their list, the checks between splits, and their weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from flora_train.config.errors import choices, user_error
from flora_train.config.task_schema import TaskConfig
from flora_train.data.labels.reader import LabelReader
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.labels.split import LabelSplit, label_numbers
from flora_train.data.labels.survey import LabelSurvey, check_targets_known
from flora_train.data.token_split import TokenSplit

MOST_NAMES = 5
"""Labels that a warning names."""

logger = logging.getLogger(__name__)


def with_labels(task: TaskConfig, surveys: Mapping[str, LabelSurvey], key: str) -> TaskConfig:
    """The task with the list of its labels, which are those of the training rows unless it names them.

    surveys: source ("train", "validation", "test") -> the labels of its rows; key: the task's configuration
    key. Raises UserError if the training rows have fewer than two labels, or another source has further ones.
    """
    reader = surveys["train"].reader
    if reader.task_type == "regression":
        return task
    seen = surveys["train"].labels
    _check_number(reader, seen)
    labels = task.known_labels
    if labels is None:
        labels = seen
        check_targets_known(surveys["train"], {s: other for s, other in surveys.items() if s != "train"})
    if isinstance(task.class_weights, dict):
        unknown = next((label for label in task.class_weights if label not in labels), None)
        if unknown is not None:
            hint = f"is no label; labels are {choices(labels)}: remove it, or correct it"
            raise user_error(f"{key}.class_weights", unknown, hint)
    return task.model_copy(update={"labels": labels})


def label_spec(task: TaskConfig, train: TokenSplit, reader: LabelReader) -> LabelSpec:
    """The labels of a task whose adapters have a head, with their weights. task: with its labels; train: its
    training rows."""
    labels = tuple(task.labels or ())
    if task.class_weights is None:
        return LabelSpec(reader.task_type, labels)
    if task.class_weights == "balanced":
        return LabelSpec(reader.task_type, labels, balanced_weights(train, len(labels)))
    weights = tuple(task.class_weights.get(label, 1.0) for label in labels)
    return LabelSpec(reader.task_type, labels, weights)


def balanced_weights(train: TokenSplit, labels: int) -> tuple[float, ...]:
    """Rows / (labels x rows of a label), as scikit-learn's `compute_class_weight("balanced")`, which counts
    the labels that occur. Of tagged texts: of tokens. A label that does not occur has the weight 1."""
    counts = np.bincount(label_numbers(train), minlength=labels)
    occurring = np.count_nonzero(counts)
    weights = counts.sum() / (max(1, occurring) * np.maximum(counts, 1))
    return tuple(np.where(counts > 0, weights, 1.0).tolist())


def check_splits(
    splits: Mapping[str, LabelSplit], surveys: Mapping[str, LabelSurvey], *, are_named: bool
) -> None:
    """Check the labels of the rows that are used.

    are_named: whether the configuration names the labels. Raises UserError if the training rows have one
    label, or the same number, and, unless labels are named, if held-out rows have a label that no training
    row has, which is a warning otherwise.
    """
    reader, train = surveys["train"].reader, splits["train"]
    if reader.task_type == "regression":
        _check_numbers_differ(reader, train)
        return
    counts = train.label_counts_by_name
    _check_number(reader, [label for label, count in counts.items() if count])
    untrained = [label for label, count in counts.items() if not count]
    for split, other in splits.items():
        of_split = other.label_counts_by_name
        held_only = [label for label in untrained if of_split[label]]
        if split == "train" or not held_only:
            continue
        if not are_named:
            _fail_for_held_only(surveys, split, held_only[0])
        logger.warning(
            f"{reader.column_key}: no training row has {_some(held_only)}, which {split} rows have"
        )
    rest = [
        label
        for label in untrained
        if not any(other.label_counts_by_name[label] for other in splits.values())
    ]
    if rest:
        logger.warning(f"{reader.column_key}: no row that is used has {_some(rest)}")


def note_single_rows(survey: LabelSurvey) -> None:
    """Warn of labels that one row has, where rows are held out label by label."""
    strata = survey.strata
    counts = np.bincount(strata)
    single = [label for label, count in zip(survey.labels, counts, strict=True) if count == 1]
    if single:
        logger.warning(
            f"{survey.reader.column_key}: one row has {_some(single)}; it is a training row, so that no "
            "held-out row has this label"
        )


def _check_number(reader: LabelReader, labels: Sequence[str]) -> None:
    """Raises UserError if there is no choice between labels."""
    if reader.task_type == "multi":
        if not labels:
            hint = (
                "is an empty list in all training rows, so that nothing can be learnt: give rows with labels"
            )
            raise user_error(reader.column_key, reader.column, hint)
        return
    if len(labels) < 2:
        given = "no label" if not labels else f"the label {labels[0]!r}"
        unit = "tokens" if reader.task_type == "tokens" else "rows"
        hint = (
            f"has {given} in all training {unit} that are used, and a choice needs two: give rows of another "
            "label"
        )
        raise user_error(reader.column_key, reader.column, hint)


def _check_numbers_differ(reader: LabelReader, train: LabelSplit) -> None:
    values = np.asarray(train.targets)
    if len(values) and (values == values[0]).all():
        hint = f"is {values[0]:g} in all training rows that are used, so that there is nothing to predict"
        raise user_error(reader.column_key, reader.column, hint)


def _fail_for_held_only(surveys: Mapping[str, LabelSurvey], split: str, label: str) -> None:
    survey = surveys.get(split, surveys["train"])
    reader = survey.reader
    hint = (
        f"is {label!r} in {survey.first_rows[label]}, and no training row that is used has this label, which "
        f"{split} rows have: give more rows with it, raise max_examples, or name the labels"
    )
    if not reader.task.is_stratified and reader.task_type == "single":
        hint += ", or set stratify: true"
    raise user_error(reader.column_key, reader.column, hint)


def _some(labels: Sequence[str]) -> str:
    named = ", ".join(repr(label) for label in labels[:MOST_NAMES])
    more = len(labels) - MOST_NAMES
    return f"{'label' if len(labels) == 1 else 'labels'} {named}{f' and {more} more' if more > 0 else ''}"
