"""Training and held-out problems: right solutions pass, wrong ones fail; none is an evaluation problem."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flora_train.evaluation.code.problems.problem import Problem
from flora_train.evaluation.code.problems.starter import load_starter_problems
from flora_train.evaluation.code.programs.execute import Program, Verdict, execute_all
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.programs.sandbox import Sandbox, open_sandbox

ROOT = Path(__file__).resolve().parents[3]
STARTER = ROOT / "eval/starter_problems.yaml"
FOLDER = ROOT / "assets/preference_problems"
TRAINING, HELD_OUT = FOLDER / "training_problems.yaml", FOLDER / "heldout_problems.yaml"
CLOSERS = {"lua": "\nend", "pl": "\n}", "rb": "\nend"}
FIRST_ARGUMENT = {"lua": "return {}", "pl": "return ${};", "rb": "{}"}
"""Language -> a body that returns its first argument, which solves no problem."""
SOLVED_BY_IT = {"pl": {"number_to_text", "text_to_number"}}
"""Language -> the problems that it solves after all: a number and its text are the same in Perl."""


def rows(table: Path) -> list[dict[str, Any]]:
    return yaml.safe_load(table.read_text(encoding="utf-8"))["problems"]


def completed(problem: Problem, body: str) -> str:
    return problem.program(f"\n    {body}{CLOSERS[problem.language]}")


def statuses(language: str, sources: list[str], sandbox: Sandbox) -> list[str]:
    """How each program ended."""
    if shutil.which(load_languages()[language].run[0]) is None:
        pytest.skip(f"{language} is not installed: eval/install_toolchains.sh {language}")
    programs = [Program(load_languages()[language], source) for source in sources]
    verdicts: dict[int, Verdict] = {}
    execute_all(programs, sandbox, workers=2, report=verdicts.__setitem__)
    return [verdicts[number].status for number in range(len(programs))]


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: eval/install_toolchains.sh")
    return open_sandbox("bubblewrap")


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "assets/check_overlap.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_there_are_enough_problems_each_with_a_name_of_its_own_and_three_solutions() -> None:
    training, held_out = rows(TRAINING), rows(HELD_OUT)
    assert len(training) >= 120
    assert len(held_out) >= 30
    for key in ("name", "doc"):
        texts = [row[key] for row in training + held_out]
        assert len(set(texts)) == len(texts)
    for row in training + held_out:
        assert set(row["solutions"]) == set(CLOSERS), row["name"]


def test_no_constant_and_no_argument_solves_a_problem() -> None:
    for row in rows(TRAINING) + rows(HELD_OUT):
        results = [test["result"] for test in row["tests"]]
        assert any(result != results[0] for result in results), row["name"]
        for index in range(len(row["args"])):
            assert [test["args"][index] for test in row["tests"]] != results, row["name"]


@pytest.mark.parametrize("language", CLOSERS)
@pytest.mark.parametrize("table", [TRAINING, HELD_OUT], ids=["training", "heldout"])
@pytest.mark.quick("heldout-lua", "heldout-pl", "heldout-rb")
def test_right_solutions_pass_and_wrong_ones_fail(language: str, table: Path, sandbox: Sandbox) -> None:
    problems = load_starter_problems(language, table)
    right, wrong = [], []
    for row in rows(table):
        problem = problems[row["name"]]
        right.append(completed(problem, row["solutions"][language]))
        first = next(iter(row["args"]))
        wrong.append(completed(problem, FIRST_ARGUMENT[language].replace("{}", first)))
    ended = statuses(language, right + wrong, sandbox)
    passed, failed = ended[: len(right)], ended[len(right) :]
    names = [row["name"] for row in rows(table)]
    assert [name for name, status in zip(names, passed, strict=True) if status != "OK"] == []
    solved = {name for name, status in zip(names, failed, strict=True) if status == "OK"}
    assert solved <= SOLVED_BY_IT.get(language, set())


def test_no_problem_is_an_evaluation_problem_by_name_words_or_behaviour(sandbox: Sandbox) -> None:
    finished = check("--problems", STARTER, "--run", TRAINING, HELD_OUT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.endswith(": 0 overlaps\n")


def test_no_held_out_problem_is_a_training_problem(sandbox: Sandbox) -> None:
    names = {row["name"] for row in rows(TRAINING)}
    assert not names & {row["name"] for row in rows(HELD_OUT)}
    # another function may pass the few tests of a problem; its own tests then tell them apart
    finished = check("--problems", TRAINING, "--run", HELD_OUT)
    back = check("--problems", HELD_OUT, "--run", TRAINING)
    pairs = {(ours, theirs) for ours, theirs in same_functions(finished.stdout)}
    assert not pairs & {(theirs, ours) for ours, theirs in same_functions(back.stdout)}


def same_functions(output: str) -> list[tuple[str, str]]:
    """The (checked, compared) problems of `--run`."""
    found = []
    for line in output.splitlines():
        if " is the same function as starter " in line:
            left, right = line.split(" is the same function as starter ")
            found.append((left.rsplit(" ", 1)[1], right.split(":")[0]))
    return found


@pytest.mark.parametrize(
    ("planted", "remark"),
    [
        ({"name": "iseven"}, "has the name of starter is_even"),
        ({"name": "is_even", "doc": "Says it."}, "has the name of starter is_even"),
        (
            {"doc": "Checks whether a number can be divided by the divisor without any rest."},
            "has words of starter is_multiple_of",
        ),
        ({"name": "splits_in_two"}, "is the same function as starter is_even"),
    ],
    ids=["spelling", "name", "words", "behaviour"],
)
def test_check_finds_a_planted_copy(
    tmp_path: Path, planted: dict[str, str], remark: str, sandbox: Sandbox
) -> None:
    tests = [{"args": [number], "result": number % 2 == 0} for number in range(4)]
    copy = {"name": "other", "doc": "Halves it.", "args": {"n": "int"}, "returns": "bool", "tests": tests}
    copy |= {"solutions": {"lua": "return n % 2 == 0"}, **planted}
    table = tmp_path / "table.yaml"
    table.write_text(json.dumps({"problems": [copy]}), encoding="utf-8")
    finished = check("--problems", STARTER, "--run", table)
    assert finished.returncode == 1
    assert remark in finished.stdout
    copy |= {"name": "is_seven", "doc": "Says seven.", "solutions": {"lua": "return n == 7"}}
    table.write_text(json.dumps({"problems": [copy]}), encoding="utf-8")
    assert check("--problems", STARTER, "--run", table).returncode == 0


def test_check_that_cannot_run_a_solution_says_so(tmp_path: Path) -> None:
    row = {**rows(HELD_OUT)[0], "solutions": {"pl": "return 1;"}}
    table = tmp_path / "table.yaml"
    table.write_text(json.dumps({"problems": [row]}), encoding="utf-8")
    finished = check("--problems", STARTER, "--run", table)
    assert finished.returncode == 1
    assert "no solution in lua" in finished.stderr
