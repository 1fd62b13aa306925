"""The starter problems: each language's program is valid, and only correct answers pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from flora_train.config.errors import UserError
from flora_train.evaluation.code.problems.problem import Problem
from flora_train.evaluation.code.problems.starter import (
    LANGUAGES,
    PROBLEMS,
    STARTER_LANGUAGES,
    load_starter_problems,
)
from flora_train.evaluation.code.programs.execute import Program, Verdict, execute_all
from flora_train.evaluation.code.programs.languages import Language, load_languages
from flora_train.evaluation.code.programs.sandbox import Sandbox
from tests.unit.evaluation.code.conftest import working

ROOT = Path(__file__).parents[5]
FIXTURES = ROOT / "tests" / "fixtures"
SOLUTIONS: Mapping[str, Mapping[str, Any]] = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((FIXTURES / "starter_solutions").glob("*.yaml"))
}
"""Language -> `correct` and `wrong`, each problem name -> body; bodies that give x or its size; `closer`,
which ends every body."""
INTERPRETED = ("lua", "pl", "rb", "js", "php", "py", "r")
DEFINED = r"(?:function|sub|def)\s+([\w.:]+)|([\w.:]+)\s*=\s*function\b"
PROBLEM = {
    "name": "echo",
    "doc": "Returns it.",
    "args": {"x": "int"},
    "returns": "int",
    "tests": [{"args": [1], "result": 1}] * 4,
}
"""The least that makes a table; tests change it."""
ODD_TEXTS = [
    "",
    "a \"quoted\" 'word'",
    "back\\slash \\n",
    "two\nlines\tand a tab",
    "$x @y #{z} %d {name} ${w} #$x \\$x",
]
"""ASCII, so that every language counts the same letters."""


@cache
def problems(language: str) -> dict[str, Problem]:
    return load_starter_problems(language)


def verdicts(language: Language, programs: Mapping[str, str], sandbox: Sandbox) -> dict[str, Verdict]:
    """Name of a program -> how it ended."""
    found: dict[int, Verdict] = {}
    execute_all(
        [Program(language, source) for source in programs.values()],
        sandbox,
        workers=2,
        report=found.__setitem__,
    )
    return {name: found[i] for i, name in enumerate(programs)}


def completed(problem: Problem, body: str) -> str:
    """The whole program, with this as the function's body."""
    return problem.program(f"\n    {body}{SOLUTIONS[problem.language]['closer']}")


def table(tmp_path: Path, *changes: Mapping[str, Any]) -> Path:
    """A table of one problem for each of `changes`, made to PROBLEM; a key that becomes None is left out."""
    rows = [
        {key: value for key, value in {**PROBLEM, **change}.items() if value is not None}
        for change in changes
    ]
    path = tmp_path / "problems.yaml"
    path.write_text(yaml.safe_dump({"problems": rows}, sort_keys=False))
    return path


@pytest.mark.parametrize("key", STARTER_LANGUAGES)
def test_a_right_solution_passes_and_a_wrong_one_fails_a_check(key: str, sandbox: Sandbox) -> None:
    assert not surprises(key, sandbox, most=1)


@pytest.mark.parametrize("key", STARTER_LANGUAGES)
@pytest.mark.quick("lua", "pl", "rb")
def test_all_right_solutions_pass_and_all_wrong_ones_fail_a_check(key: str, sandbox: Sandbox) -> None:
    assert not surprises(key, sandbox)


def surprises(key: str, sandbox: Sandbox, most: int | None = None) -> dict[str, Verdict]:
    """The programs of a language that did not end as they should, of the first `most` right and wrong ones
    each."""
    language = working(key, sandbox)
    bodies = {
        (kind, name): SOLUTIONS[key][kind][name]
        for kind in ("correct", "wrong")
        for name in list(SOLUTIONS[key][kind])[:most]
    }
    programs = {
        f"{kind} {name}": completed(problems(key)[name], body) for (kind, name), body in bodies.items()
    }
    return {
        name: verdict
        for name, verdict in verdicts(language, programs, sandbox).items()
        if verdict.status != ("OK" if name.startswith("correct") else "AssertionError")
    }


def test_solutions_cover_every_language_and_in_the_interpreted_ones_every_problem() -> None:
    assert set(SOLUTIONS) == set(STARTER_LANGUAGES)
    for key in SOLUTIONS:
        assert len(SOLUTIONS[key]["correct"]) >= 6
        assert len(SOLUTIONS[key]["wrong"]) >= 2
    for key in (*INTERPRETED, "cpp"):
        assert len(SOLUTIONS[key]["wrong"]) >= 6
    for key in INTERPRETED:
        assert set(SOLUTIONS[key]["correct"]) == set(problems(key))


@pytest.mark.parametrize("key", STARTER_LANGUAGES)
def test_every_problem_is_rendered_with_every_placeholder_filled(key: str) -> None:
    assert len(problems(key)) >= 24
    for name, problem in problems(key).items():
        assert (problem.language, problem.name) == (key, name)
        assert not problem.prompt.endswith(("\n", " "))
        assert name.replace("_", "") in problem.prompt.lower().replace("_", "")
        assert not re.search(
            r"\{(doc|name|parameters|returns|checks|arguments|result|type|value|items)\}",
            problem.prompt + problem.tests,
        )
        assert problem.program("") == f"{problem.prompt}\n{problem.tests}"
        assert problem.stop_tokens


def test_no_constant_and_no_argument_solves_a_problem() -> None:
    for problem in yaml.safe_load(PROBLEMS.read_text())["problems"]:
        results = [test["result"] for test in problem["tests"]]
        assert any(result != results[0] for result in results), problem["name"]
        for i, arg in enumerate(problem["args"]):
            assert [test["args"][i] for test in problem["tests"]] != results, (problem["name"], arg)


def test_languages_are_those_of_the_tables() -> None:
    assert list(STARTER_LANGUAGES) == list(yaml.safe_load(LANGUAGES.read_text()))
    assert len(STARTER_LANGUAGES) == 13
    assert set(STARTER_LANGUAGES) <= set(load_languages())


def test_prompts_look_like_the_training_data() -> None:
    assert (
        problems("lua")["is_even"].prompt == "-- Checks whether a number is even.\nlocal function is_even(n)"
    )
    assert problems("pl")["larger_of_two"].prompt == (
        "# Returns the larger of two numbers.\nsub larger_of_two {\n    my ($first, $second) = @_;"
    )
    assert (
        problems("rb")["sum_list"].prompt
        == "# Returns the sum of all numbers in a list.\ndef sum_list(numbers)"
    )


def test_no_name_is_in_the_training_data_or_in_multipl_e() -> None:
    taken = {spelt(name) for name in names_of_training_data()}
    assert len(taken) > 1000
    multipl_e = {spelt(path) for path in map(multipl_e_name, (FIXTURES / "multipl_e").glob("*.json"))}
    assert multipl_e == {"add"}
    assert not {name for name in problems("lua") if spelt(name) in taken | multipl_e}


def names_of_training_data() -> Iterator[str]:
    for path in sorted((ROOT / "assets" / "code").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for found in re.finditer(
                DEFINED, " ".join(row.get(field, "") for field in ("prompt", "completion", "text"))
            ):
                yield re.split(r"[.:]", found[1] or found[2])[-1]


def multipl_e_name(path: Path) -> str:
    return str(json.loads(path.read_text())["name"]).split("_", 2)[2]


def spelt(name: str) -> str:
    return name.replace("_", "").lower()


@pytest.mark.parametrize("key", STARTER_LANGUAGES)
def test_unusual_values_are_rendered_as_in_the_table(key: str, sandbox: Sandbox, tmp_path: Path) -> None:
    language = working(key, sandbox)
    words = [[], [""], ODD_TEXTS, ["ä€", "x"]]
    cases: dict[tuple[str, str], list[tuple[Any, Any]]] = {
        ("text_size", "str"): [(text, len(text)) for text in ODD_TEXTS],
        ("echo", "list[str]"): [(value, value) for value in words],
        ("list_size", "list[str]"): [(value, len(value)) for value in words],
        ("echo", "int"): [(value, value) for value in (0, -7, 1, 2**31)],
        ("echo", "bool"): [(value, value) for value in (True, False, True, False)],
        ("echo", "float"): [(value, value) for value in (0.0, -2.5, 0.125, 3.0)],
        ("echo", "list[int]"): [(value, value) for value in ([], [-1], [0, 5, -3], [7, 7])],
    }
    if key not in INTERPRETED:  # a compilation each
        cases = dict(list(cases.items())[:2])
    rows = [
        {
            "name": f"{body}_{re.sub('[^a-z]+', '', kind)}",
            "args": {"x": kind},
            "returns": kind if body == "echo" else "int",
            "tests": [{"args": [value], "result": result} for value, result in tests],
        }
        for (body, kind), tests in cases.items()
    ]
    asked = load_starter_problems(key, table(tmp_path, *rows)).values()
    programs = {
        f"{body} {kind}": completed(problem, SOLUTIONS[key][body])
        for (body, kind), problem in zip(cases, asked, strict=True)
    }
    ended = verdicts(language, programs, sandbox)
    assert {name: verdict for name, verdict in ended.items() if verdict.status != "OK"} == {}


def test_a_language_without_starter_problems_is_an_error_with_the_choices() -> None:
    with pytest.raises(
        UserError, match=r"language = 'luaa': .*has no starter problems; there are cpp, .*Did you mean 'lua'"
    ):
        load_starter_problems("luaa")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"doc": None}, r"echo\.doc: is required"),
        ({"name": None}, r"problems\.0\.name: is required"),
        ({"name": "isEven"}, r"isEven\.name = 'isEven': .*pattern"),
        ({"extra": 1}, r"echo\.extra = 1: is not a key here"),
        ({"args": {"x": "number"}}, r"echo\.args\.x = 'number': .*'int', 'bool'"),
        ({"args": {}}, r"echo\.args = \{\}: .*at least 1 item"),
        ({"returns": "none"}, r"echo\.returns = 'none': .*'int', 'bool'"),
        ({"tests": [{"args": [1], "result": 1}]}, r"echo\.tests = .*at least 4 items"),
        ({"tests": [{"args": [1]}] * 4}, r"echo\.tests\.0\.result: is required"),
        ({"args": {"x": "int", "y": "int"}}, r"echo: test 1 has 1 args, but the function has 2"),
        ({"args": {"x": "str"}}, r"echo: test 1: x is 1, which is not of type str"),
        ({"returns": "bool"}, r"echo: test 1: the result is 1, which is not of type bool"),
        ({"returns": "float"}, r"echo: test 1: the result is 1, which is not of type float"),
        (
            {"tests": [{"args": [2**53 + 1], "result": 1}] * 4},
            r"echo: test 1: x is 9007199254740993, which is not of type int",
        ),
        (
            {"args": {"x": "list[int]"}, "tests": [{"args": [[1, True]], "result": 1}] * 4},
            r"echo: test 1: x is \[1, True\], which is not of type list\[int\]",
        ),
        (
            {"args": {"x": "str"}, "tests": [{"args": ["\r"], "result": 1}] * 4},
            r"echo: test 1: x is .*, which is not of type str",
        ),
    ],
)
def test_a_damaged_problem_is_an_error_that_names_file_and_place(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = table(tmp_path, change)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: {words}"):
        load_starter_problems("lua", path)


def test_a_repeated_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"problems\.yaml = 'echo': occurs twice"):
        load_starter_problems("lua", table(tmp_path, {}, {}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("problems: []", "problems = .*at least 1 item"),
        ("problem: []", "problems: is required"),
        ("problems: [", "is not readable YAML"),
        ("problems: [3]", r"problems\.0 = 3"),
    ],
)
def test_a_damaged_table_is_an_error(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "problems.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{words}"):
        load_starter_problems("lua", path)


def test_a_damaged_language_is_an_error(tmp_path: Path) -> None:
    rows = yaml.safe_load(LANGUAGES.read_text())
    del rows["rb"]["check"]
    rows["pl"]["types"] = {"text": "x"}
    path = tmp_path / "languages.yaml"
    path.write_text(yaml.safe_dump(rows))
    with pytest.raises(UserError) as raised:
        load_starter_problems("lua", PROBLEMS, path)
    assert f"{path}: rb.check: is required" in str(raised.value)
    assert f"{path}: pl.types.text" in str(raised.value)
