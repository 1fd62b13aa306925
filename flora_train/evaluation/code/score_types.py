"""Types of the scores on programming problems: scores.json of a suite, and `code` in report.json."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flora_train.evaluation.code.programs.execute import Status
from flora_train.evaluation.result_model import (
    Confidence,
    Count,
    Interval,
    Number,
    ResultModel,
    Seconds,
    SparseModel,
    Text,
)

PassAtK = dict[Annotated[int, Field(ge=1)], Interval]
"""k -> pass@k, or a difference of two."""


class PassRates(ResultModel):
    """pass@k of a family."""

    family: Text
    pass_at: PassAtK


class CodeScore(PassRates):
    """pass@k of one contender in one language, and how its programs ended."""

    name: Text
    samples: Count
    """Completions per problem; the smallest number where they differ."""
    ended: dict[Status, Count]
    """Status -> number of programs."""
    suspicious: Count
    """Programs that passed, but whose text ends the program early."""
    cut: Count
    """Completions that reached the length limit."""


class CodeDifference(ResultModel):
    """pass@k of the family `first` minus that of the family `second`, paired by problem."""

    first: Text
    second: Text
    pass_at: PassAtK


class ProgramExample(ResultModel):
    """One completion of a problem, and how many samples of the same contender pass."""

    completion: Text
    status: Status
    passed: Count
    samples: Count


class DecidedProblem(ResultModel):
    """A problem that an adapter solves more often (won) or less often (lost) than the base."""

    outcome: Literal["won", "lost"]
    family: Text
    problem: Text
    prompt: Text
    base: ProgramExample
    adapter: ProgramExample


class LanguageScores(SparseModel):
    """Scores in one programming language."""

    written_if_set = ("over_seeds",)

    language: Text
    """Key of eval/languages.yaml."""
    name: Text
    """The language's name for readers."""
    problems: Count
    available: Count
    """Problems of the suite in this language."""
    prompts_sha: Text
    """SHA-256 of the problems."""
    contenders: tuple[CodeScore, ...]
    over_seeds: tuple[CodeScore, ...] = ()
    """Means, and sums of counts, of adapters that differ in their seed only, under their common name."""
    differences: tuple[CodeDifference, ...]
    """Each adapter against the base, and each pair of adapters; of seeds, their means in pairs."""
    cpu_seconds: Seconds
    """CPU time limit of a program."""
    wins_and_losses: tuple[DecidedProblem, ...]

    @cached_property
    def by_family(self) -> dict[str, CodeScore]:
        """Family -> its scores."""
        return {contender.family: contender for contender in self.contenders}

    @cached_property
    def to_base(self) -> dict[str, PassAtK]:
        """Family -> difference to the base."""
        return differences_to_base(self.differences)


class MacroScores(SparseModel):
    """Means over the languages in which every family that is shown takes part.

    Families of one method on different tasks (`joined_families.py`) count as one.
    """

    written_if_set = ("over_seeds",)

    languages: tuple[Text, ...]
    contenders: tuple[PassRates, ...]
    over_seeds: tuple[PassRates, ...] = ()
    """Means of adapters that differ in their seed only, under their common name."""
    differences: tuple[CodeDifference, ...]

    @cached_property
    def by_family(self) -> dict[str, PassRates]:
        """Family -> its means."""
        return {contender.family: contender for contender in self.contenders}

    @cached_property
    def to_base(self) -> dict[str, PassAtK]:
        """Family -> difference to the base."""
        return differences_to_base(self.differences)


class NotEvaluated(ResultModel):
    """A language that could not be evaluated here."""

    language: Text
    reason: Text


class CodeSuite(ResultModel):
    """Scores of base and adapters on one suite of programming problems."""

    suite: Text
    source: Text
    """Value of evaluation.problems that the suite was loaded from."""
    num_samples: Count
    pass_at_k: Annotated[tuple[Annotated[Count, Field(ge=1)], ...], Field(min_length=1)]
    temperature: Number
    top_p: Number
    max_new_tokens: Count
    seed: int
    confidence: Confidence
    sandbox: Text
    completions: Count
    """Programs that were executed."""
    tokens: Count
    """Tokens of these completions."""
    languages: tuple[LanguageScores, ...]
    macro: MacroScores
    not_evaluated: tuple[NotEvaluated, ...]
    origin_differences: tuple[Text, ...] = ()
    """How base or data differ from those that the run was trained with."""

    @model_validator(mode="after")
    def _every_k_is_scored(self) -> Self:
        parts: list[LanguageScores | MacroScores] = [*self.languages, self.macro]
        for part in parts:
            scores = [row.pass_at for row in part.contenders] + [row.pass_at for row in part.differences]
            for pass_at in scores:
                missing = set(self.pass_at_k) - set(pass_at)
                if missing:
                    raise ValueError(f"pass_at lacks pass@{min(missing)}")
        return self

    @cached_property
    def families(self) -> list[str]:
        """Families that take part in any language, the base first."""
        families: dict[str, None] = {}
        for part in self.languages:
            families |= dict.fromkeys(part.by_family)
        return list(families)


def differences_to_base(differences: tuple[CodeDifference, ...]) -> dict[str, PassAtK]:
    """Family -> its difference to the base."""
    return {difference.first: difference.pass_at for difference in differences if difference.second == "base"}
