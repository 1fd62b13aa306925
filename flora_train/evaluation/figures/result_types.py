"""Types of the figures of predictions: `figures` and `confusions` in report.json."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Self

from pydantic import Field, StrictBool, model_validator

from flora_train.evaluation.result_model import Confidence, Count, Interval, ResultModel, SparseModel, Text


class FigureScore(ResultModel):
    """A figure of the base model, of an adapter or of a baseline."""

    name: Text
    family: Text
    value: Interval


class FigureDifference(ResultModel):
    """A figure of the family, or baseline, `first` minus that of `second`, paired by example."""

    first: Text
    second: Text
    value: Interval


class FigureResult(SparseModel):
    """One figure of base, adapters and baselines on the same held-out examples of a task."""

    written_if_set = ("baselines", "over_seeds", "setting")

    task: Text
    figure: Annotated[Text, Field(min_length=1)]
    """Such as rouge_l or macro_f1, or a function of the user's own as module:function."""
    lower_is_better: StrictBool
    examples: Count
    setting: Text = ""
    """How the predictions were made, such as `greedy, up to 64 tokens`; empty if there is no choice."""
    confidence: Confidence
    contenders: Annotated[tuple[FigureScore, ...], Field(min_length=1)]
    """The base, if it makes predictions, and the task's adapters."""
    over_seeds: tuple[FigureScore, ...] = ()
    """Means of adapters that differ in their seed only, under their common name."""
    baselines: tuple[FigureScore, ...] = ()
    """Predictions that need no adapter, such as those of the most frequent label."""
    differences: tuple[FigureDifference, ...]
    """Each adapter, or mean over seeds, against the base and against every baseline, and adapters, or means,
    against each other."""

    @cached_property
    def by_family(self) -> dict[str, FigureScore]:
        """Family -> its figure."""
        return {contender.family: contender for contender in self.contenders}

    @cached_property
    def to_base(self) -> dict[str, Interval]:
        """Family -> difference to the base."""
        return self.against("base")

    def against(self, second: str) -> dict[str, Interval]:
        """Family -> difference to the base or to a baseline."""
        return {
            difference.first: difference.value
            for difference in self.differences
            if difference.second == second
        }

    @property
    def between(self) -> list[FigureDifference]:
        """The differences between adapters."""
        others = {"base", *(baseline.family for baseline in self.baselines)}
        return [difference for difference in self.differences if difference.second not in others]


class ConfusionMatrix(ResultModel):
    """How often each label was predicted for each label of the references."""

    task: Text
    family: Text
    labels: tuple[Text, ...]
    counts: tuple[tuple[Count, ...], ...]
    """A row for each label of the references, a column for each prediction."""

    @model_validator(mode="after")
    def _is_square(self) -> Self:
        sizes = {len(self.labels), len(self.counts), *map(len, self.counts)}
        if len(sizes) > 1:
            raise ValueError("counts: must have a row and a column for each label")
        return self

    @property
    def largest_confusions(self) -> list[tuple[str, str, int]]:
        """(label of the reference, predicted label, examples) of wrong predictions, most frequent first."""
        confusions = []
        for true, row in zip(self.labels, self.counts, strict=True):
            for predicted, count in zip(self.labels, row, strict=True):
                if count and predicted != true:
                    confusions.append((true, predicted, count))
        return sorted(confusions, key=lambda confusion: -confusion[2])
