"""How good a global adapter is on held-out examples: of everybody, and of each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from flora_train.evaluation.bootstrap import Estimator, compare_ratios
from flora_train.evaluation.figures.classification import label_statistic
from flora_train.evaluation.figures.intervals import Resampled, Resampling, resampled_figures
from flora_train.evaluation.figures.statistic import Matrix, Statistic, Vector, combined
from flora_train.evaluation.result_model import Interval
from flora_train.training.heldout import HeldOut

OF_LABELS = ("accuracy", "macro_f1")
OF_TEXT = ("bits_per_byte",)
ONLY = 0
"""The contender of a comparison without others."""


@dataclass(frozen=True)
class Scores:
    """What the first figure is the ratio of, for each held-out example, and predicted labels."""

    numerators: NDArray[np.float64]
    """[n]: 1 for a text whose label is right, or the bits of a text."""
    denominators: NDArray[np.float64]
    """[n]: 1, or the bytes of a text."""
    predictions: NDArray[np.int64]
    """[n], of labels; empty for texts."""
    references: NDArray[np.int64]
    """[n], of labels; empty for texts."""

    @property
    def names(self) -> tuple[str, ...]:
        """The figures, the first of which is the ratio."""
        return OF_LABELS if len(self.predictions) else OF_TEXT

    def tensors(self) -> dict[str, Tensor]:
        """As they are saved."""
        return {name: from_numpy(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Scores:
        """What `tensors` gave."""
        return cls(**{name: tensors[name].numpy() for name in cls.__dataclass_fields__})


def scores_of(results: Sequence[tuple[HeldOut, int]]) -> Scores:
    """The scores of several tasks, one after the other.

    Args:
        results: (held-out results of a task, id of the adapter), all of labels or all of texts.

    Returns:
        The scores in that order.
    """
    numerators, denominators, predictions, references = [], [], [], []
    for heldout, adapter in results:
        if heldout.labels is None:
            numerators.append(heldout.nats[adapter] / np.log(2))
            denominators.append(heldout.label_bytes.astype(np.float64))
            continue
        predicted = np.array(heldout.labels.predicted(adapter), dtype=np.int64)
        expected = np.array(heldout.labels.targets, dtype=np.int64)
        predictions.append(predicted)
        references.append(expected)
        numerators.append((predicted == expected).astype(np.float64))
        denominators.append(np.ones(len(expected)))
    return Scores(
        np.concatenate(numerators),
        np.concatenate(denominators),
        np.concatenate([np.zeros(0, dtype=np.int64), *predictions]),
        np.concatenate([np.zeros(0, dtype=np.int64), *references]),
    )


def resampled(scores: Scores, resampling: Resampling) -> dict[str, Resampled]:
    """Every figure on all held-out examples, and on the same resamples for all adapters.

    Args:
        scores: Of one adapter.
        resampling: Settings of the bootstrap.

    Returns:
        Figure -> values, in the order of `Scores.names`.
    """

    def ratio(weights: Matrix) -> dict[str, Vector]:
        return {scores.names[0]: weights @ scores.numerators / (weights @ scores.denominators)}

    statistics: list[Statistic] = [ratio]
    if len(scores.predictions):
        statistics.append(label_statistic(scores.predictions, scores.references))
    examples = len(scores.numerators)
    figures = resampled_figures(
        {ONLY: combined(statistics)}, examples, samples=resampling.samples, seed=resampling.seed
    )[ONLY]
    return {name: figures[name] for name in scores.names}


def intervals_of(
    figures: Mapping[str, Resampled], examples: int, resampling: Resampling
) -> dict[str, Interval]:
    """Figure -> value and interval. examples: on which they were computed."""
    estimator = Estimator(resampling.confidence, single_example=examples == 1)
    return {name: estimator(own.value, own.samples).interval() for name, own in figures.items()}


def mean_over_seeds(figures: Sequence[Mapping[str, Resampled]]) -> dict[str, Resampled]:
    """Figure -> its mean over seeds, on all examples and on every resample."""
    means = {}
    for name in figures[0]:
        value = float(np.mean([own[name].value for own in figures]))
        means[name] = Resampled(value, np.mean([own[name].samples for own in figures], axis=0))
    return means


def figures_of_clients(
    scores: Scores, members: Mapping[str, Sequence[int]], resampling: Resampling
) -> dict[str, Interval]:
    """The first figure on the held-out examples of each client that has some.

    Args:
        scores: Of the global adapter.
        members: Client -> positions of its held-out examples in the scores.
        resampling: Settings of the bootstrap.

    Returns:
        Client -> value and interval.
    """
    figures = {}
    for client, positions in members.items():
        own = np.array(positions, dtype=np.int64)
        if not len(own) or not scores.denominators[own].sum():
            continue
        compared = compare_ratios(
            {ONLY: scores.numerators[own]},
            scores.denominators[own],
            samples=resampling.samples,
            confidence=resampling.confidence,
            seed=resampling.seed,
        )
        figures[client] = compared.contenders[ONLY].interval()
    return figures
