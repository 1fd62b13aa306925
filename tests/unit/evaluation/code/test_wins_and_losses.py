"""The problems that adapters won or lost most clearly against the base, and none without a change."""

from __future__ import annotations

from typing import Any

from flora_train.evaluation.code.completion_log import Key, LoggedCompletion
from flora_train.evaluation.code.contenders import Contender
from flora_train.evaluation.code.problems.problem import Problem
from flora_train.evaluation.code.score_types import DecidedProblem, ProgramExample
from flora_train.evaluation.code.wins_and_losses import wins_and_losses

PROBLEMS = {
    name: Problem("lua", name, f"-- {name}\n", "", ("\nstop",)) for name in ("one", "two", "three", "four")
}
CONTENDERS = [
    Contender(name, family, 0, ("lua",), "")
    for name, family in (("base", "base"), ("f", "flora"), ("l", "lora"))
]


def found(passed: dict[str, dict[str, str]]) -> list[DecidedProblem]:
    """passed: adapter -> problem -> a letter per sample, + for one that passes."""
    logged, records = [], {}
    for adapter, problems in passed.items():
        for name, letters in problems.items():
            for sample, letter in enumerate(letters):
                entry = LoggedCompletion(
                    adapter, "lua", name, sample, f"{adapter}{sample}\nstop here", "stop", 3, "", ""
                )
                logged.append(entry)
                records[entry.key] = {"status": "OK" if letter == "+" else "Exception"}
    keyed: dict[Key, dict[str, Any]] = records
    return wins_and_losses(PROBLEMS, "lua", CONTENDERS, logged=logged, records=keyed)


def test_the_clearest_of_each_kind_over_all_adapters() -> None:
    won, lost = found(
        {
            "base": {"one": "---", "two": "+--", "three": "+++", "four": "++-"},
            "f": {"one": "-+-", "two": "---", "three": "+++", "four": "++-"},
            "l": {"one": "+-+", "two": "+--", "three": "-+-", "four": "+++"},
        }
    )
    assert (won.outcome, won.family, won.problem, won.prompt) == ("won", "lora", "one", "-- one\n")
    assert won.base == ProgramExample(completion="base0", status="Exception", passed=0, samples=3)
    assert won.adapter == ProgramExample(completion="l0", status="OK", passed=2, samples=3)
    assert (lost.outcome, lost.family, lost.problem) == ("lost", "lora", "three")
    assert lost.base == ProgramExample(completion="base0", status="OK", passed=3, samples=3)
    assert lost.adapter == ProgramExample(completion="l0", status="Exception", passed=1, samples=3)


def test_there_are_no_wins_and_losses_without_a_change() -> None:
    assert found({"base": {"one": "-+", "two": "++"}, "f": {"one": "+-", "two": "++"}}) == []


def test_a_problem_tried_by_one_side_only_is_not_compared() -> None:
    assert found({"base": {"one": "--"}, "f": {"two": "++"}}) == []
