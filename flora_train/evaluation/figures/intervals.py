"""Figures of several contenders on the same examples, with bootstrap intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flora_train.adapters.spec import BASE_ID
from flora_train.evaluation.bootstrap import Estimator, compared_pairs, resampled_weights
from flora_train.evaluation.figures.result_types import FigureDifference, FigureResult, FigureScore
from flora_train.evaluation.figures.statistic import Statistic, Vector
from flora_train.evaluation.result_model import Interval
from flora_train.evaluation.seeds import SeedGroup, compared_ids, group_ids, over_seeds

LARGEST = 1e100
"""Values beyond it are shown as not finite: differences of them need not be numbers."""


@dataclass(frozen=True)
class ContenderNames:
    """How results name a contender."""

    name: str
    family: str


@dataclass(frozen=True)
class Resampled:
    """A figure on all examples and on every resample of them, NaN where it is undefined."""

    value: float
    samples: Vector

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.value - other.value, self.samples - other.samples)


Figures = Mapping[str, Resampled]
"""Name of a figure -> its values."""


@dataclass(frozen=True)
class Resampling:
    """Settings of the bootstrap."""

    samples: int
    confidence: float
    seed: int


@dataclass(frozen=True)
class Contenders:
    """Who is compared, and how results name them."""

    names: Mapping[int, ContenderNames]
    """Of adapters and of the base (-1), which may be missing."""
    groups: Sequence[SeedGroup] = ()
    """Adapters, of any task, that differ in their seed only."""
    baselines: Mapping[int, str] = field(default_factory=dict)
    """Id below -1 -> name of a baseline."""


def resampled_figures(
    statistics: Mapping[int, Statistic], examples: int, *, samples: int, seed: int
) -> dict[int, dict[str, Resampled]]:
    """Contender -> its figures on all examples and on the same resamples for every contender."""
    blocks: dict[tuple[int, str], list[Vector]] = {}
    values: dict[int, dict[str, float]] = {}
    with np.errstate(all="ignore"):
        for contender, statistic in statistics.items():
            on_all = statistic(np.ones((1, examples)))
            values[contender] = {name: float(vector[0]) for name, vector in on_all.items()}
        for weights in resampled_weights(examples, samples=samples, seed=seed):
            for contender, statistic in statistics.items():
                for name, vector in statistic(weights).items():
                    blocks.setdefault((contender, name), []).append(vector)
    figures: dict[int, dict[str, Resampled]] = {contender: {} for contender in statistics}
    for (contender, name), vectors in blocks.items():
        figures[contender][name] = Resampled(values[contender][name], np.concatenate(vectors))
    return figures


class FigureComparison:
    """Makes the results of a task's figures.

    figures: contender id -> its figures; the same for all but baselines, which may lack some.
    """

    def __init__(
        self,
        task: str,
        figures: Mapping[int, Figures],
        contenders: Contenders,
        *,
        examples: int,
        confidence: float,
        setting: str = "",
    ) -> None:
        self.task, self.examples, self.confidence, self.setting = task, examples, confidence, setting
        self.figures: dict[int, Figures] = dict(figures)
        self.contenders = contenders
        self._estimator = Estimator(confidence, single_example=examples == 1)
        self.adapters = [i for i in figures if i > BASE_ID]
        self.groups = group_ids(contenders.groups, self.adapters)
        self._names = dict(contenders.names)
        self._names |= {i: ContenderNames(name, name) for i, name in contenders.baselines.items()}
        for i, group in self.groups.items():
            self._names[i] = ContenderNames(group.name, group.family)
            self.figures[i] = _mean_figures([figures[member] for member in group.members])

    def result(self, figure: str, lower_is_better: bool) -> FigureResult:
        """The result of one figure."""
        own = [i for i in (BASE_ID, *self.adapters) if i in self.figures]
        baselines = [i for i in self.contenders.baselines if figure in self.figures.get(i, {})]
        means = []
        for i, group in self.groups.items():
            score = self._score(i, figure)
            of_seeds = [self.figures[member][figure].value for member in group.members]
            means.append(score.replace(value=over_seeds(score.value, of_seeds)))
        return FigureResult(
            task=self.task,
            figure=figure,
            lower_is_better=lower_is_better,
            examples=self.examples,
            setting=self.setting,
            confidence=self.confidence,
            contenders=[self._score(i, figure) for i in own],
            over_seeds=means,
            baselines=[self._score(i, figure) for i in baselines],
            differences=self._differences(figure, baselines, lower_is_better),
        )

    def _differences(
        self, figure: str, baselines: Sequence[int], lower_is_better: bool
    ) -> list[FigureDifference]:
        learnt = [*self.adapters, *self.groups]
        others = [*([BASE_ID] if BASE_ID in self.figures else []), *baselines]
        pairs = [(adapter, other) for other in others for adapter in learnt]
        compared = compared_ids(self.adapters, self.groups)
        pairs += compared_pairs(compared, self._best(compared, figure, lower_is_better))
        differences = []
        for first, second in pairs:
            between = self.figures[first][figure] - self.figures[second][figure]
            differences.append(
                FigureDifference(
                    first=self._names[first].family,
                    second=self._names[second].family,
                    value=self._interval(between),
                )
            )
        return differences

    def _best(self, compared: Sequence[int], figure: str, lower_is_better: bool) -> int | None:
        values = {i: self.figures[i][figure].value for i in compared}
        finite = [i for i in compared if np.isfinite(values[i])]
        sign = 1 if lower_is_better else -1
        return min(finite, key=lambda i: sign * values[i], default=None)

    def _score(self, contender: int, figure: str) -> FigureScore:
        names = self._names[contender]
        value = self._interval(self.figures[contender][figure])
        return FigureScore(name=names.name, family=names.family, value=value)

    def _interval(self, figure: Resampled) -> Interval:
        """The interval over the resamples in which the figure is defined; None without any."""
        defined = figure.samples[np.isfinite(figure.samples)]
        if not len(defined) or not abs(figure.value) < LARGEST or not (np.abs(defined) < LARGEST).all():
            return Interval(value=None, low=None, high=None, excludes_zero=False)
        return self._estimator(figure.value, defined).interval()


def _mean_figures(seeds: Sequence[Figures]) -> dict[str, Resampled]:
    """The means over seeds, on all examples and on every resample."""
    means = {}
    for name in seeds[0]:
        value = float(np.mean([figures[name].value for figures in seeds]))
        means[name] = Resampled(value, np.mean([figures[name].samples for figures in seeds], axis=0))
    return means
