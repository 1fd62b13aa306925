"""Programs in many languages get the verdicts that they deserve."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from flora_train.evaluation.code.completion_files import read_completions
from flora_train.evaluation.code.programs.execute import Program, Verdict, execute, execute_all
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.programs.process import Ended
from flora_train.evaluation.code.programs.sandbox import Limits, Sandbox
from tests.unit.evaluation.code.conftest import working

FIXTURES = Path(__file__).parents[4] / "fixtures" / "multipl_e"
KEYS = sorted(path.name.partition("-")[0] for path in FIXTURES.glob("*.json"))
IN_TABLE = [key for key in KEYS if key in load_languages()]
ENDS = {
    "lua": {
        "AssertionError": "local function add(x, y)\n  return x - y\nend",
        "SyntaxError": "local function add(x, y)\n  return x +\nend",
    },
    "pl": {
        "AssertionError": "sub add { my ($x, $y) = @_; return $x - $y; }",
        "SyntaxError": "sub add { my ($x, $y) = @_; return $x + ; }",
    },
    "py": {
        "AssertionError": "def add(x, y):\n    return x - y",
        "SyntaxError": "def add(x, y):\n    return x +",
        "Exception": "def add(x, y):\n    return nothing",
        "OutOfMemory": "def add(x, y):\n    return bytearray(1 << 33)",
        "Timeout": "def add(x, y):\n    while True: pass",
    },
    "cpp": {
        "AssertionError": "#include <bits/stdc++.h>\nlong add(long x, long y) { return x - y;",
        "SyntaxError": "#include <bits/stdc++.h>\nlong add(long x, long y) { return x + ;",
        "Timeout": "#include <bits/stdc++.h>\nlong add(long x, long y) { for (volatile int i = 0;; ++i) {}",
        "Exception": "#include <bits/stdc++.h>\nlong add(long x, long y) { throw 1;",
    },
}


@pytest.mark.parametrize("key", IN_TABLE)
@pytest.mark.quick("lua", "pl", "py")
def test_the_fixtures_pass_and_fail(key: str, sandbox: Sandbox) -> None:
    language = working(key, sandbox)
    (path,) = FIXTURES.glob(f"{key}-*.json")
    passing, failing = read_completions(path, None)
    assert execute(Program(language, passing.problem.program(passing.text)), sandbox).status == "OK"
    assert execute(Program(language, failing.problem.program(failing.text)), sandbox).status in (
        "AssertionError",
        "SyntaxError",
        "Exception",
    )


def test_every_fixture_names_a_language_of_the_table() -> None:
    assert (
        {completion.problem.language for completion in read_completions(FIXTURES, None)}
        == set(KEYS)
        == set(IN_TABLE)
    )


@pytest.mark.parametrize(("key", "status"), [(key, status) for key, ends in ENDS.items() for status in ends])
def test_every_way_to_end_has_its_status(key: str, status: str, sandbox: Sandbox) -> None:
    language = working(key, sandbox).model_copy(update={"seconds": 2.0})
    (path,) = FIXTURES.glob(f"{key}-*.json")
    tests = json.loads(path.read_text())["tests"]
    verdict = execute(Program(language, f"{ENDS[key][status]}\n{tests}"), sandbox)
    assert verdict.status == status, verdict


def test_much_output_is_drained_and_not_waited_for(sandbox: Sandbox) -> None:
    language = working("py", sandbox)
    verdict = execute(
        Program(language, "import sys\nfor _ in range(1000): sys.stdout.write('x' * 300_000)"), sandbox
    )
    assert verdict.status == "OK"
    assert verdict.seconds < 5
    assert len(verdict.output) <= 2000


def test_equal_programs_run_once_and_every_sample_gets_its_verdict(sandbox: Sandbox) -> None:
    language = working("sh", sandbox)
    sources = ["true", "date +%s%N >&2; [[ 1 = 2 ]]", "date +%s%N >&2; [[ 1 = 2 ]]", "true"]
    verdicts: dict[int, Verdict] = {}
    execute_all(
        [Program(language, source) for source in sources], sandbox, workers=2, report=verdicts.__setitem__
    )
    assert [verdicts[i].status for i in range(4)] == ["OK", "AssertionError", "AssertionError", "OK"]
    assert verdicts[1].output == verdicts[2].output


BUSY = "local function spin(seconds) while os.clock() < seconds do end end\n"


@pytest.mark.parametrize(
    ("source", "status", "again"),
    [
        (BUSY + "spin(0.1)", "OK", False),
        (BUSY + "spin(3)", "Timeout", True),  # within what it may compute beside others, too long alone
        (BUSY + "spin(60)", "Timeout", False),  # out of time wherever it runs: not run again
    ],
)
def test_a_late_program_is_rerun_alone(source: str, status: str, again: bool, sandbox: Sandbox) -> None:
    language = working("lua", sandbox).model_copy(update={"seconds": 2.0})
    verdicts: dict[int, Verdict] = {}
    execute_all(
        [Program(language, source), Program(language, "os.exit(0)")],
        sandbox,
        workers=2,
        report=verdicts.__setitem__,
    )
    assert (verdicts[0].status, verdicts[0].reran_alone) == (status, again), verdicts[0]


def test_a_program_stopped_by_the_clock_is_rerun_alone(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = working("sh", sandbox)
    calls: list[float] = []

    def first_time_late(command: Any, wall: float) -> Ended:
        calls.append(wall)
        return Ended(137 if len(calls) == 1 else 0, "", "", wall, len(calls) == 1)

    monkeypatch.setattr("flora_train.evaluation.code.programs.execute.run_command", first_time_late)
    verdicts: dict[int, Verdict] = {}
    execute_all([Program(language, "sleep 1")], sandbox, workers=2, report=verdicts.__setitem__)
    assert (verdicts[0].status, verdicts[0].reran_alone) == ("OK", True)
    assert calls[1] < calls[0]  # alone, it has its own limit


def test_with_one_worker_no_program_runs_twice(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    language = working("sh", sandbox)
    walls: list[float] = []

    def late(command: Any, wall: float) -> Ended:
        walls.append(wall)
        return Ended(137, "", "", wall, True)

    monkeypatch.setattr("flora_train.evaluation.code.programs.execute.run_command", late)
    verdicts: dict[int, Verdict] = {}
    execute_all([Program(language, "sleep 1")], sandbox, workers=1, report=verdicts.__setitem__)
    assert (verdicts[0].status, verdicts[0].reran_alone) == ("Timeout", False)
    assert walls == [Limits(language.seconds).wall]  # the limit is its own from the start


def test_an_interrupt_ends_the_programs_that_run(sandbox: Sandbox) -> None:
    language = load_languages()["sh"]

    def interrupt(i: int, verdict: Verdict) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        execute_all(
            [Program(language, "sleep 50"), Program(language, "exit 1")], sandbox, workers=2, report=interrupt
        )
    assert time.monotonic() - started < 25  # of the 50 that the first would have slept
    assert execute(Program(language, "exit 0"), sandbox).status == "OK"
