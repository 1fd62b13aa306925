"""Outputs of heads for held-out texts, what they predict, and the labels that they are compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from flora_train.data.batch import IGNORE
from flora_train.data.labels.spec import LabelSpec, Target
from flora_train.data.labels.split import LabelSplit

Values: TypeAlias = NDArray[np.float64]
Predictions: TypeAlias = list[str] | list[list[str]] | list[float]
"""single: the label of each text. multi: the labels of each text. regression: its number. tokens: the labels
of those of its tokens that have one."""

LIKELY = 0.0
"""The logit from which on a text has one of several labels: a probability of one half."""
LARGEST_LOGIT = 500.0
"""Beyond it, exp has no number."""


@dataclass(frozen=True)
class HeldOutLabels:
    """The outputs of the heads of a task's adapters for its first n held-out texts."""

    spec: LabelSpec
    split: LabelSplit
    examples: int
    """n."""
    outputs: Mapping[int, Sequence[Values]]
    """Adapter id -> for each text its outputs (logits, or a number), [outputs], or [tokens, outputs]."""

    def logits(self, adapter: int) -> Values:
        """The outputs of all texts, [n, outputs], or of all their tokens that have a label."""
        if self.spec.task_type != "tokens":
            return np.stack(self.outputs[adapter]) if self.examples else np.empty((0, self.spec.outputs))
        labelled = [self.outputs[adapter][i][self._has_label(i)] for i in range(self.examples)]
        return np.concatenate([np.empty((0, self.spec.outputs)), *labelled])

    def scores(self, adapter: int) -> Values | None:
        """The probability of each label of each text, [n, labels]; None for regression and tokens."""
        if self.spec.task_type not in ("single", "multi"):
            return None
        logits = self.logits(adapter)
        if self.spec.task_type == "multi":
            return 1.0 / (1.0 + np.exp(-np.clip(logits, -LARGEST_LOGIT, LARGEST_LOGIT)))
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def predicted(self, adapter: int) -> list[Target]:
        """What the adapter predicts for each text, in the form of `targets`. A token without label has the
        most likely one, too."""
        return [self._predicted(values) for values in self.outputs[adapter]]

    def _predicted(self, values: Values) -> Target:
        if self.spec.task_type == "regression":
            return float(values[0])
        if self.spec.task_type == "single":
            return int(values.argmax())
        if self.spec.task_type == "tokens":
            return tuple(int(label) for label in values.argmax(axis=1))
        return tuple(float(value > LIKELY) for value in values)

    @property
    def targets(self) -> list[Target]:
        """What each text is labelled with, see `LabelSplit.target`."""
        return [self.split.target(i) for i in range(self.examples)]

    def predictions(self, adapter: int) -> Predictions:
        """What the adapter predicts for each text."""
        if self.spec.task_type == "regression":
            return [float(values[0]) for values in self.outputs[adapter]]
        if self.spec.task_type == "tokens":
            tags: list[list[str]] = []
            for i, values in enumerate(self.outputs[adapter]):
                tags.append([self.spec.labels[k] for k in values[self._has_label(i)].argmax(axis=1)])
            return tags
        if self.spec.task_type == "single":
            return [self.spec.labels[int(values.argmax())] for values in self.outputs[adapter]]
        return [self._labels(values > LIKELY) for values in self.outputs[adapter]]

    @property
    def references(self) -> Predictions:
        """The labels of each text, in the form of `predictions`."""
        values = [self.split.target_values(i) for i in range(self.examples)]
        if self.spec.task_type == "regression":
            return [float(target[0]) for target in values]
        if self.spec.task_type == "tokens":
            tags: list[list[str]] = []
            for target in values:
                tags.append([self.spec.labels[int(k)] for k in target if k != IGNORE])
            return tags
        if self.spec.task_type == "single":
            return [self.spec.labels[int(target[0])] for target in values]
        return [self._labels(target > 0) for target in values]

    def accuracy(self, adapter: int) -> float | None:
        """The share of texts (or of tokens that have a label) that are predicted as they are labelled; None
        for regression and where there are none."""
        if self.spec.task_type == "regression":
            return None
        predicted, expected = self.predictions(adapter), self.references
        if self.spec.task_type == "tokens":
            predicted, expected = _joined(predicted), _joined(expected)
        hits = [own == other for own, other in zip(predicted, expected, strict=True)]
        return sum(hits) / len(hits) if hits else None

    def _has_label(self, example: int) -> NDArray[np.bool_]:
        return self.split.target_values(example) != IGNORE

    def _labels(self, chosen: NDArray[np.bool_]) -> list[str]:
        return [label for label, is_chosen in zip(self.spec.labels, chosen, strict=True) if is_chosen]


def _joined(tags: Predictions) -> list[str]:
    joined: list[str] = []
    for of_text in tags:
        assert isinstance(of_text, list)
        joined += of_text
    return joined


def majority(split: LabelSplit) -> str | float | None:
    """The prediction that reads no text: the most frequent label of a split, or the mean of its numbers; None
    for several labels of a text, and without rows. Ties go to the first label."""
    if split.spec.task_type == "regression":
        return float(np.mean(split.targets)) if len(split.targets) else None
    counts = Counter(split.label_counts_by_name)
    if split.spec.task_type == "multi" or not counts.total():
        return None
    return counts.most_common(1)[0][0]


class OutputStore:
    """The outputs of many rows while they are computed, flat, so that processes can add them up."""

    def __init__(self, spec: LabelSpec, split: LabelSplit, examples: int) -> None:
        self.spec, self.split, self.examples = spec, split, examples
        sizes = [self._tokens(i) * spec.outputs for i in range(examples)]
        self._ends = np.cumsum([0, *sizes])

    @property
    def size(self) -> int:
        """Numbers of one adapter."""
        return int(self._ends[-1])

    def place(self, example: int) -> slice:
        """Where the outputs of an example are."""
        return slice(int(self._ends[example]), int(self._ends[example + 1]))

    def result(self, flat: Mapping[int, Values]) -> HeldOutLabels:
        """flat: adapter id -> all its outputs."""
        outputs = {adapter: self._by_example(values) for adapter, values in flat.items()}
        return HeldOutLabels(self.spec, self.split, self.examples, outputs)

    def _by_example(self, values: Values) -> list[Values]:
        shape: tuple[int, ...] = (self.spec.outputs,)
        if self.spec.task_type == "tokens":
            shape = (-1, self.spec.outputs)
        return [values[self.place(i)].reshape(shape) for i in range(self.examples)]

    def _tokens(self, example: int) -> int:
        return self.split.length(example) if self.spec.task_type == "tokens" else 1
