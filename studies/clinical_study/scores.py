"""Macro-F1 of every method on every task, with the same bootstrap resamples of the test texts for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev

import numpy as np
from numpy.typing import NDArray

from flora_train.data.splits import seed_of
from flora_train.evaluation.bootstrap import Estimate, Estimator
from flora_train.evaluation.figures.classification import label_statistic
from flora_train.evaluation.figures.intervals import resampled_figures

from .tasks import Predictions, StudyTask

FIGURE = "macro_f1"
SAMPLES, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class Score:
    """Macro-F1 of one method, the mean over its seeds."""

    value: float
    samples: NDArray[np.float64]
    """Of each resample of the test texts."""
    seeds: tuple[float, ...]
    """Of each seed, on all test texts."""

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None for a single one."""
        return stdev(self.seeds) if len(self.seeds) > 1 else None

    def estimate(self) -> Estimate:
        """The value with its interval."""
        return Estimator(CONFIDENCE, single_example=False)(self.value, self.samples)

    def minus(self, other: Score) -> Estimate:
        """The difference to another method on the same texts, paired by text."""
        difference = self.samples - other.samples
        return Estimator(CONFIDENCE, single_example=False)(self.value - other.value, difference)


def task_scores(task: StudyTask, predictions: Predictions) -> dict[str, Score]:
    """Method -> its score on a task, of all methods that have predictions for it."""
    statistics = {}
    members: dict[str, list[int]] = {}
    for method in predictions.methods():
        for _, labels in predictions.read(method, task):
            members.setdefault(method, []).append(len(statistics))
            statistics[len(statistics)] = label_statistic(labels, task.test.labels)
    # all training sets of a chapter have the same test texts: the same resamples pair them, too
    seed = seed_of(0, task.name)
    figures = resampled_figures(statistics, len(task.test.labels), samples=SAMPLES, seed=seed)
    scores = {}
    for method, ids in members.items():
        own = [figures[i][FIGURE] for i in ids]
        values = tuple(figure.value for figure in own)
        samples = np.mean([figure.samples for figure in own], axis=0)
        scores[method] = Score(float(np.mean(values)), samples, values)
    return scores


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean over tasks, whose test texts are resampled independently of each other."""
    seeds: tuple[float, ...] = ()
    counts = {len(score.seeds) for score in scores}
    if len(counts) == 1:
        seeds = tuple(float(np.mean(values)) for values in zip(*(s.seeds for s in scores), strict=True))
    return Score(
        float(np.mean([score.value for score in scores])),
        np.mean([score.samples for score in scores], axis=0),
        seeds,
    )


def complete_methods(scores: Iterable[Mapping[str, Score]]) -> set[str]:
    """The methods that have a score on every task."""
    present = [set(of_task) for of_task in scores]
    return set.intersection(*present) if present else set()
