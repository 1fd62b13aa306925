"""Titles and explanations of the figures of held-out preferences, the same wherever they are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flora_train.evaluation.preferences.score_types import Figure, PreferenceResult, PreferenceScore
from flora_train.evaluation.result_model import Interval

OBJECTIVES = {"dpo": "DPO", "ipo": "IPO", "orpo": "ORPO", "kto": "KTO"}

METRIC_NAMES: dict[Figure, str] = {
    "reward_accuracy": "reward_accuracy",
    "reward_margin": "reward_margin",
    "chosen_likelier": "chosen_likelier",
    "chosen_likelier_per_token": "chosen_likelier_per_token",
    "loss": "preference_loss",
}
"""Figure -> its key for trackers and model cards."""


@dataclass(frozen=True)
class FigureText:
    """How a figure is shown."""

    figure: Figure
    name: str
    """For tables and trackers, such as `reward accuracy`."""
    meaning: str
    """What it is, for the caption of a table."""
    in_percent: bool
    lower_is_better: bool = False


PAIRED = (
    FigureText(
        "reward_accuracy", "reward accuracy", "pairs whose chosen completion has the higher reward", True
    ),
    FigureText("reward_margin", "reward margin", "mean reward of chosen minus rejected completions", False),
    FigureText(
        "chosen_likelier",
        "chosen likelier",
        "pairs whose chosen completion has the higher log-probability",
        True,
    ),
    FigureText(
        "chosen_likelier_per_token",
        "chosen likelier per token",
        "pairs whose chosen completion has the higher log-probability per token, "
        "which does not favour short completions",
        True,
    ),
    FigureText("loss", "preference loss", "mean loss of the objective per pair", False, lower_is_better=True),
)
"""Figures of pairs of completions."""
LABELLED = (
    FigureText(
        "reward_accuracy",
        "reward sign accuracy",
        "rows whose reward is positive if they are desirable and negative if they are not",
        True,
    ),
    FigureText(
        "reward_margin", "reward gap", "mean reward of desirable rows minus that of undesirable rows", False
    ),
    FigureText("loss", "preference loss", "mean loss of the objective per row", False, lower_is_better=True),
)
"""Figures of labelled completions (KTO)."""


def figures_of(result: PreferenceResult) -> Sequence[FigureText]:
    """The figures of a task."""
    return PAIRED if result.is_paired else LABELLED


def values_of(
    result: PreferenceResult, text: FigureText
) -> Iterator[tuple[PreferenceScore, Interval, Interval | None]]:
    """Each contender with its value, and the difference to the base; None for the base."""
    for contender in (*result.contenders, *result.over_seeds):
        value = contender.figure(text.figure)
        if value is None:
            continue
        difference = None
        if contender.family in result.to_base:
            difference = result.to_base[contender.family].figure(text.figure)
        yield contender, value, difference


def examples_of(result: PreferenceResult) -> str:
    """`120 pairs`, or `120 rows, 57 desirable`."""
    n = result.examples
    if result.is_paired:
        return f"{n:,} pair" if n == 1 else f"{n:,} pairs"
    rows = f"{n:,} row" if n == 1 else f"{n:,} rows"
    return f"{rows}, {result.desirable or 0:,} desirable"


def setting_of(result: PreferenceResult) -> str:
    """`DPO, beta 0.1`."""
    return f"{OBJECTIVES[result.objective]}, beta {result.beta:g}"
