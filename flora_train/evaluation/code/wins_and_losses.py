"""The problems that adapters win over the base or lose to it: one of each per language."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

from flora_train.evaluation.code.completion_log import Key, LoggedCompletion
from flora_train.evaluation.code.contenders import Contender
from flora_train.evaluation.code.problems.problem import Problem
from flora_train.evaluation.code.programs.execute import Status
from flora_train.evaluation.code.programs.verdicts import VerdictRecord
from flora_train.evaluation.code.score_types import DecidedProblem, ProgramExample

Samples = list[tuple[str, Status]]
"""Completion and status of each sample of a problem."""


def wins_and_losses(
    problems: Mapping[str, Problem],
    language: str,
    contenders: Iterable[Contender],
    *,
    logged: Iterable[LoggedCompletion],
    records: Mapping[Key, VerdictRecord],
) -> list[DecidedProblem]:
    """The problems where the share of passing samples rose most over the base, and where it fell most.

    Ties go to the first contender and the first problem.
    """
    samples: dict[tuple[str, str], Samples] = defaultdict(list)
    for entry in logged:
        if entry.language == language and entry.key in records and entry.name in problems:
            samples[entry.adapter, entry.name].append((entry.completion, records[entry.key]["status"]))
    base = {name for adapter, name in samples if adapter == "base"}
    gains = []
    for contender in contenders:
        for name in problems:
            if contender.name != "base" and name in base and (contender.name, name) in samples:
                gain = _passing(samples[contender.name, name]) - _passing(samples["base", name])
                gains.append((gain, contender, name))
    if not gains:
        return []
    outcomes: tuple[tuple[Literal["won", "lost"], int], ...] = (("won", 1), ("lost", -1))
    decided = []
    for outcome, sign in outcomes:
        gain, contender, name = max(gains, key=lambda row: sign * row[0])
        if sign * gain > 0:
            problem = problems[name]
            decided.append(
                DecidedProblem(
                    outcome=outcome,
                    family=contender.family,
                    problem=name,
                    prompt=problem.prompt,
                    base=_example(problem, samples["base", name], passes=outcome == "lost"),
                    adapter=_example(problem, samples[contender.name, name], passes=outcome == "won"),
                )
            )
    return decided


def _passing(samples: Samples) -> float:
    return sum(status == "OK" for _, status in samples) / len(samples)


def _example(problem: Problem, samples: Samples, passes: bool) -> ProgramExample:
    """The first sample that passes, or the first that does not."""
    completion, status = next(sample for sample in samples if (sample[1] == "OK") == passes)
    passed = sum(status == "OK" for _, status in samples)
    return ProgramExample(
        completion=problem.cut(completion), status=status, passed=passed, samples=len(samples)
    )
