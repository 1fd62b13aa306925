"""Figures of labels with scikit-learn's conventions: accuracy, balanced accuracy, F1, MCC, confusions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.evaluation.figures.statistic import (
    Matrix,
    Statistic,
    Vector,
    check_lengths,
    mean_statistic,
    values_of,
)

Labels = Sequence[Any] | NDArray[Any]
"""A label of each example, text or whole numbers."""
Indicators = Sequence[Sequence[Any]] | NDArray[Any]
"""[n, labels], whether an example has each label."""


@dataclass(frozen=True)
class LabelCounts:
    """How often each label occurs, in R resamples of the examples. Each array is [R, labels]."""

    true: Matrix
    """In the references."""
    predicted: Matrix
    hits: Matrix
    """In both, of the same example."""

    def accuracy(self) -> Vector:
        """Share of examples whose label is right."""
        return self.hits.sum(axis=1) / self.true.sum(axis=1)

    def balanced_accuracy(self) -> Vector:
        """Mean recall of the labels that occur in the references."""
        occurs = self.true > 0
        recall = _ratio(self.hits, self.true)
        return (recall * occurs).sum(axis=1) / occurs.sum(axis=1)

    def f1(self) -> Matrix:
        """F1 of each label, 0 for a label that occurs nowhere."""
        return _ratio(2 * self.hits, self.true + self.predicted)

    def macro_f1(self, all_labels: bool = False) -> Vector:
        """Mean F1 of the labels that are predicted or occur in the references. all_labels: of all labels."""
        counted = (self.true + self.predicted > 0) | all_labels
        return (self.f1() * counted).sum(axis=1) / counted.sum(axis=1)

    def micro_f1(self) -> Vector:
        """F1 of all labels together, 0 if none is predicted and none occurs."""
        return _ratio(2 * self.hits.sum(axis=1), (self.true + self.predicted).sum(axis=1))

    def weighted_f1(self) -> Vector:
        """Mean F1 of the labels, weighted by how often they occur in the references."""
        return _ratio((self.f1() * self.true).sum(axis=1), self.true.sum(axis=1))

    def mcc(self) -> Vector:
        """Matthews' correlation coefficient, 0 if all predictions, or all references, are the same."""
        examples = self.true.sum(axis=1)
        covariance = self.hits.sum(axis=1) * examples - (self.true * self.predicted).sum(axis=1)
        of_predicted = examples**2 - (self.predicted**2).sum(axis=1)
        of_true = examples**2 - (self.true**2).sum(axis=1)
        return _ratio(covariance, np.sqrt(of_predicted * of_true))


def label_statistic(predictions: Labels, references: Labels) -> Statistic:
    """accuracy, balanced_accuracy, macro_f1, weighted_f1 and mcc of one label per example."""
    predicted, true, labels = _codes(predictions, references)
    indicators = _indicators(predicted == true, _one_hot(predicted, len(labels)), _one_hot(true, len(labels)))

    def statistic(weights: Matrix) -> dict[str, Vector]:
        counts = _counts(weights, indicators)
        return {
            "accuracy": counts.accuracy(),
            "balanced_accuracy": counts.balanced_accuracy(),
            "macro_f1": counts.macro_f1(),
            "weighted_f1": counts.weighted_f1(),
            "mcc": counts.mcc(),
        }

    return statistic


def accuracy(predictions: Labels, references: Labels) -> float | None:
    """Share of examples whose label is right; None without examples."""
    return _label_figure("accuracy", predictions, references)


def balanced_accuracy(predictions: Labels, references: Labels) -> float | None:
    """Mean recall of the labels that occur in the references; None without examples."""
    return _label_figure("balanced_accuracy", predictions, references)


def macro_f1(predictions: Labels, references: Labels) -> float | None:
    """Mean F1 of the labels that are predicted or occur in the references; None without examples."""
    return _label_figure("macro_f1", predictions, references)


def weighted_f1(predictions: Labels, references: Labels) -> float | None:
    """Mean F1 of the labels, weighted by how often they occur in the references; None without examples."""
    return _label_figure("weighted_f1", predictions, references)


def mcc(predictions: Labels, references: Labels) -> float | None:
    """Matthews' correlation coefficient, 0 if all predictions, or all references, are the same; None without
    examples."""
    return _label_figure("mcc", predictions, references)


def confusion_matrix(predictions: Labels, references: Labels, labels: Sequence[Any]) -> NDArray[np.int64]:
    """Number of examples by reference (row) and prediction (column), in the order of `labels`.

    Examples whose reference or prediction is not in `labels` are left out, as scikit-learn does.
    """
    check_lengths(predictions, references)
    position = {label: i for i, label in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for predicted, true in zip(_listed(predictions), _listed(references), strict=True):
        if predicted in position and true in position:
            matrix[position[true], position[predicted]] += 1
    return matrix


def multi_label_statistic(predictions: Indicators, references: Indicators) -> Statistic:
    """micro_f1, macro_f1 (over all labels) and subset_accuracy of several labels per example."""
    check_lengths(predictions, references)
    predicted, true = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if not len(true):
        predicted = true = np.zeros((0, 1))
    if predicted.shape != true.shape:
        raise ValueError(f"{predicted.shape[1]} labels of predictions and {true.shape[1]} of references")
    indicators = np.hstack([true, predicted, true * predicted])
    exact = mean_statistic("subset_accuracy", (predicted == true).all(axis=1))

    def statistic(weights: Matrix) -> dict[str, Vector]:
        counts = _counts(weights, indicators)
        return {
            "micro_f1": counts.micro_f1(),
            "macro_f1": counts.macro_f1(all_labels=True),
            **exact(weights),
        }

    return statistic


def multi_label_figures(predictions: Indicators, references: Indicators) -> dict[str, float | None]:
    """micro_f1, macro_f1 and subset_accuracy; empty without examples."""
    return values_of(multi_label_statistic(predictions, references), len(references))


def token_statistic(predictions: Sequence[Labels], references: Sequence[Labels]) -> Statistic:
    """token_accuracy and token_macro_f1 of the tokens of all examples, which are resampled as a whole."""
    check_lengths(predictions, references)
    for predicted, true in zip(predictions, references, strict=True):
        check_lengths(predicted, true)
    sizes = [len(true) for true in references]
    example = np.repeat(np.arange(len(sizes)), sizes)
    codes = _codes(_flat(predictions), _flat(references))
    predicted, true, labels = codes
    of_tokens = _indicators(predicted == true, _one_hot(predicted, len(labels)), _one_hot(true, len(labels)))
    indicators = np.zeros((len(sizes), of_tokens.shape[1]))
    np.add.at(indicators, example, of_tokens)

    def statistic(weights: Matrix) -> dict[str, Vector]:
        counts = _counts(weights, indicators)
        return {"token_accuracy": counts.accuracy(), "token_macro_f1": counts.macro_f1()}

    return statistic


def token_figures(predictions: Sequence[Labels], references: Sequence[Labels]) -> dict[str, float | None]:
    """token_accuracy and token_macro_f1; None without tokens, empty without examples."""
    return values_of(token_statistic(predictions, references), len(references))


def _label_figure(name: str, predictions: Labels, references: Labels) -> float | None:
    return values_of(label_statistic(predictions, references), len(references)).get(name)


def _codes(
    predictions: Labels, references: Labels
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
    """Predictions and references as positions in the sorted labels, which are the third."""
    n = check_lengths(predictions, references)
    labels, codes = np.unique(np.asarray([*_listed(predictions), *_listed(references)]), return_inverse=True)
    return codes[:n], codes[n:], labels


def _listed(labels: Labels) -> list[Any]:
    return labels.tolist() if isinstance(labels, np.ndarray) else list(labels)


def _flat(sequences: Sequence[Labels]) -> list[Any]:
    return [label for sequence in sequences for label in _listed(sequence)]


def _one_hot(codes: NDArray[np.int64], labels: int) -> Matrix:
    matrix = np.zeros((len(codes), labels))
    matrix[np.arange(len(codes)), codes] = 1
    return matrix


def _indicators(is_hit: NDArray[np.bool_], predicted: Matrix, true: Matrix) -> Matrix:
    """[n, 3 labels]: references, predictions and hits of each example."""
    return np.hstack([true, predicted, true * is_hit[:, None]])


def _counts(weights: Matrix, indicators: Matrix) -> LabelCounts:
    true, predicted, hits = np.hsplit(weights @ indicators, 3)
    return LabelCounts(true, predicted, hits)


def _ratio(numerators: NDArray[Any], denominators: NDArray[Any]) -> NDArray[np.float64]:
    """The ratio, 0 where the denominator is 0."""
    return np.divide(numerators, denominators, out=np.zeros_like(numerators), where=denominators != 0)
