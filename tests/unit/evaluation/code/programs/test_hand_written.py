"""Correct and wrong hand-written solutions of MultiPL-E problems get the right verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flora_train.evaluation.code.problems.problem import load_problems
from flora_train.evaluation.code.programs.early_exit import exits_early
from flora_train.evaluation.code.programs.execute import Program, execute
from flora_train.evaluation.code.programs.sandbox import Sandbox
from tests.unit.evaluation.code.conftest import working

FOLDER = Path(__file__).parents[4] / "fixtures" / "multipl_e_problems"
SOLUTIONS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in (FOLDER / "solutions").glob("*.yaml")
}
DESERVED = {"right": "OK", "wrong": "AssertionError"}


def test_every_problem_of_seven_languages_has_a_right_and_a_wrong_solution() -> None:
    assert sorted(SOLUTIONS) == ["cpp", "js", "lua", "php", "pl", "py", "rb"]
    for key, solutions in SOLUTIONS.items():
        assert len(solutions) == 6
        assert solutions.keys() == load_problems(FOLDER, key).keys()
        assert all(written.keys() == DESERVED.keys() for written in solutions.values())


@pytest.mark.parametrize(
    ("key", "name"), [(key, name) for key in sorted(SOLUTIONS) for name in SOLUTIONS[key]]
)
def test_the_right_solution_passes_and_the_wrong_one_fails_an_assertion(
    key: str, name: str, sandbox: Sandbox
) -> None:
    language, problem = working(key, sandbox), load_problems(FOLDER, key)[name]
    for kind, status in DESERVED.items():
        completion = SOLUTIONS[key][name][kind]
        verdict = execute(Program(language, problem.program(completion)), sandbox)
        assert verdict.status == status, (kind, verdict)
        assert not exits_early(language, completion)
