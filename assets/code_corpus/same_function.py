"""Finds problems that ask for the same function under another name: one's solution passes the other's tests.

Solutions run in Lua, in the sandbox that also runs the programs of models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from flora_train.config.errors import UserError
from flora_train.evaluation.code.problems.starter import load_starter_problems
from flora_train.evaluation.code.programs.execute import Program, Verdict, execute_all
from flora_train.evaluation.code.programs.languages import Language, find_language, load_languages
from flora_train.evaluation.code.programs.sandbox import open_sandbox

from .overlap import OverlapError

INSTRUCTIONS = 1_000_000
"""Lua instructions that one solution may use for the tests of one problem."""
_SIGNATURE = re.compile(r"function ([\w.]+)\(([^)]*)\)\s*\Z")
_TEST = re.compile(r"^function (test_\w+)\(\)", re.MULTILINE)
_RUN = "os.exit(lu.LuaUnit.run())"
_PRELUDE = f"""
local function passes(test)
    debug.sethook(function() error("too many instructions") end, "", {INSTRUCTIONS})
    local passed = pcall(test)
    debug.sethook()
    return passed
end
"""


@dataclass(frozen=True)
class Tests:
    """The tests of one evaluation problem in Lua."""

    problem: str
    function: str
    """The name by which the tests call the function."""
    parameters: int
    text: str


@dataclass(frozen=True)
class Solved:
    """One of our problems with a correct function in Lua."""

    problem: str
    parameters: int
    function: str
    source: str


def same_functions(table: Path, tests: Sequence[Tests]) -> Iterator[tuple[str, str]]:
    """(ours, theirs) for every solution in `table` that passes all tests of an evaluation problem.

    Raises OverlapError if a solution is missing, or if programs cannot be run."""
    solved = solutions(table)
    try:
        language, sandbox = find_language("lua", load_languages()), open_sandbox("bubblewrap")
    except UserError as error:
        raise OverlapError(str(error)) from error
    programs = [_program(problem, tests, language) for problem in solved]
    verdicts: dict[int, Verdict] = {}
    execute_all(programs, sandbox, workers=2, report=verdicts.__setitem__)
    for number, problem in enumerate(solved):
        verdict = verdicts[number]
        if "all compared" not in verdict.output:
            raise OverlapError(f"{table}: {problem.problem}: {verdict.status}: {verdict.output[-200:]}")
        for name in re.findall(r"^passes (.+)$", verdict.output, re.MULTILINE):
            yield problem.problem, name


def solutions(table: Path) -> list[Solved]:
    """The problems of a table with their solutions in Lua. Raises OverlapError for one without."""
    prompts = load_starter_problems("lua", table)
    solved = []
    for row in yaml.safe_load(table.read_text(encoding="utf-8"))["problems"]:
        body = row.get("solutions", {}).get("lua")
        if body is None:
            raise OverlapError(f"{table}: {row['name']}: no solution in lua, so that nothing can be run")
        source = f"{prompts[row['name']].prompt}\n    {body}\nend\n"
        solved.append(Solved(row["name"], len(row["args"]), row["name"], source))
    return solved


def starter_tests(table: Path) -> list[Tests]:
    """The tests of a table of starter problems."""
    rows = yaml.safe_load(table.read_text(encoding="utf-8"))["problems"]
    rendered = load_starter_problems("lua", table)
    found = []
    for row in rows:
        problem = rendered[row["name"]]
        found.append(Tests(f"starter {row['name']}", row["name"], len(row["args"]), problem.tests))
    return found


def prompt_tests(folder: Path) -> list[Tests]:
    """The tests of MultiPL-E's `humaneval-lua.jsonl`. Raises OverlapError without that file."""
    file = folder / "humaneval-lua.jsonl"
    if not file.is_file():
        raise OverlapError(f"{file}: no such file, so that nothing can be run")
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        signature = _SIGNATURE.search(row["prompt"].rstrip())
        if signature:
            parameters = len(signature[2].split(","))
            found.append(Tests(row["name"], signature[1], parameters, row["tests"]))
    return found


def _program(solved: Solved, tests: Sequence[Tests], language: Language) -> Program:
    parts = [solved.source, "lu = require('luaunit')", _PRELUDE]
    for test in tests:
        entry = _TEST.search(test.text)
        if test.parameters != solved.parameters or entry is None:
            continue
        alias = ""
        if test.function != solved.function:
            alias = f"local {test.function} = {solved.function}"
        body = test.text.replace(_RUN, "")
        report = f'if passes({entry[1]}) then print("passes {test.problem}") end'
        parts.append(f"do\n{alias}\n{body}\n{report}\nend")
    parts.append('print("all compared")')
    return Program(language, "\n".join(parts))
