"""Types of the results on held-out preferences: `preferences` in report.json."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, StrictBool

from flora_train.evaluation.result_model import (
    Confidence,
    Count,
    Interval,
    Number,
    ResultModel,
    SparseModel,
    Text,
)

Figure = Literal["reward_accuracy", "reward_margin", "chosen_likelier", "chosen_likelier_per_token", "loss"]
"""A figure of `PreferenceFigures`."""


class PreferenceFigures(ResultModel):
    """Figures of one contender on held-out preferences, or differences of two contenders' figures.

    The reward of a completion is beta * (log p - log p of the reference), for ORPO, which has no reference,
    beta * mean log p per token.
    """

    reward_accuracy: Interval
    """Share of pairs whose chosen completion has the higher reward. KTO: share of rows whose reward is
    positive if the row is desirable and negative if it is not. Ties count one half."""
    reward_margin: Interval
    """Mean reward of chosen minus rejected completions. KTO: mean reward of desirable rows minus that of
    undesirable rows."""
    chosen_likelier: Interval | None
    """Share of pairs whose chosen completion has the higher log-probability, ties one half. None for KTO."""
    chosen_likelier_per_token: Interval | None
    """The same of log-probabilities per token, which do not favour short completions."""
    loss: Interval
    """Mean of the objective's loss."""

    def figure(self, name: Figure) -> Interval | None:
        """One of the figures."""
        value: Interval | None = getattr(self, name)
        return value


class PreferenceScore(PreferenceFigures):
    """Figures of the base model or of an adapter."""

    name: Text
    family: Text


class PreferenceDifference(PreferenceFigures):
    """Figures of the family `first` minus those of the family `second`, paired by example."""

    first: Text
    second: Text


class PreferenceResult(SparseModel):
    """Base and adapters of one preference task on the same held-out pairs, or labelled rows."""

    written_if_set = ("over_seeds",)

    task: Text
    objective: Literal["dpo", "ipo", "orpo", "kto"]
    beta: Number
    examples: Count
    """Pairs. KTO: rows."""
    desirable: Count | None
    """KTO: rows that are labelled desirable."""
    base_is_reference: StrictBool
    """Whether the base is the reference of its own rewards, which are then all 0."""
    confidence: Confidence
    contenders: Annotated[tuple[PreferenceScore, ...], Field(min_length=1)]
    """The base and the task's adapters."""
    over_seeds: tuple[PreferenceScore, ...] = ()
    """Means of adapters that differ in their seed only, under their common name."""
    differences: tuple[PreferenceDifference, ...]
    """Each adapter against the base, and adapters against each other; of seeds, their means in pairs."""

    @property
    def is_paired(self) -> bool:
        return self.objective != "kto"

    @cached_property
    def by_family(self) -> dict[str, PreferenceScore]:
        """Family -> its figures."""
        return {contender.family: contender for contender in self.contenders}

    @cached_property
    def to_base(self) -> dict[str, PreferenceDifference]:
        """Family -> difference to the base."""
        return {
            difference.first: difference for difference in self.differences if difference.second == "base"
        }
