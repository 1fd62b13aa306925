"""The status of a failed run is right, whatever the program itself printed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from flora_train.evaluation.code.programs import process
from flora_train.evaluation.code.programs.execute import Program, Verdict, execute, execute_all
from flora_train.evaluation.code.programs.sandbox import Sandbox
from tests.unit.evaluation.code.conftest import working

GO = 'package p\nimport "testing"\nfunc TestIt(t *testing.T) {{ {} }}'
D = "import std.stdio;\nlong f() {{ {} }}\nunittest {{ assert(f() == 2); }}\nvoid main() {{}}"
ELIXIR = 'ExUnit.start()\ndefmodule T do\n  use ExUnit.Case\n  test "it" do\n    {}\n  end\nend'
CLOJURE = "(require '[clojure.test :refer [deftest is run-test]])\n(deftest it {})\n(run-test it)"
ENDS = [
    ("pl", 'print "debug"; print STDERR "debug"; exit 1;', "AssertionError"),
    ("pl", 'die "no";', "Exception"),
    ("pl", 'print "no end;', "SyntaxError"),
    ("sh", "set -e\necho debug >&2\n[[ 1 = 2 ]]", "AssertionError"),
    ("sh", "set -e\nno_such_command", "Exception"),
    ("py", "import sys\nsys.stderr.write('x' * 300_000)\nassert 1 == 2", "AssertionError"),
    ("js", "console.error('x'.repeat(300000));\nrequire('node:assert').equal(1, 2);", "AssertionError"),
]
SLOW_ENDS = [
    ("go", GO.format('panic("no")'), "Exception"),
    ("go", GO.format('t.Errorf("no")'), "AssertionError"),
    ("d", D.format('throw new Exception("no");'), "Exception"),
    ("d", D.format("return 1;"), "AssertionError"),
    ("elixir", ELIXIR.format('raise "no"'), "Exception"),
    ("elixir", ELIXIR.format("assert 1 == 2"), "AssertionError"),
    (
        "clj",
        CLOJURE.format("(is (= 1 2)) " * 10),
        "AssertionError",
    ),  # "10 failures, 0 errors" is not "0 failures, 0 errors"
    ("clj", CLOJURE.format('(throw (Exception. "no"))'), "Exception"),
    ("clj", CLOJURE.format('(print (apply str (repeat 300000 "x"))) (is (= 1 1))'), "OK"),
]
"""In languages whose programs take seconds."""


@pytest.mark.parametrize(
    ("key", "source", "status"), [*ENDS, *(pytest.param(*end, marks=pytest.mark.full) for end in SLOW_ENDS)]
)
def test_a_failed_run_has_its_status(key: str, source: str, status: str, sandbox: Sandbox) -> None:
    verdict = execute(Program(working(key, sandbox), source), sandbox)
    assert verdict.status == status, verdict


BASH = (
    'f() {\n{}\n}\ncandidate() {\n    f "$@"\n}\nset -e\nrun_test() {\n    [[ $(candidate) = "{}" ]]\n}\n'
    "run_test"
)
FOREVER = "    while :; do :; done"


ENDLESS = [
    BASH.replace("{}", FOREVER, 1).replace("{}", "1"),
    BASH.replace("{}", FOREVER, 1).replace(
        "{}", ""
    ),  # what the substitution gives when its process was stopped
    BASH.replace("{}", f"    trap '' XCPU\n    echo 1\n{FOREVER}", 1).replace("{}", "1"),
    BASH.replace("{}", f"    x=$( {FOREVER.strip()} )\n    echo 1", 1).replace("{}", "1"),
    FOREVER,
]


@pytest.mark.parametrize(("source", "workers"), [(source, 1) for source in ENDLESS] + [(ENDLESS[1], 2)])
def test_an_endless_bash_program_is_a_timeout(source: str, workers: int, sandbox: Sandbox) -> None:
    language = working("sh", sandbox).model_copy(update={"seconds": 1.0})
    verdicts: dict[int, Verdict] = {}
    execute_all([Program(language, source)], sandbox, workers=workers, report=verdicts.__setitem__)
    assert verdicts[0].status == "Timeout", verdicts[0]


@pytest.mark.parametrize("source", ['print "ERROR\\n"; exit 0;', 'print STDERR "an ERROR"; print "ok!";'])
def test_perl_that_prints_error_is_an_exception_as_in_multipl_e(source: str, sandbox: Sandbox) -> None:
    verdict = execute(Program(working("pl", sandbox), source), sandbox)
    assert (verdict.status, verdict.exit) == ("Exception", 0)


def test_the_end_of_the_output_is_kept_for_a_late_reader(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*arguments: Any) -> None:
        time.sleep(0.5)
        drain(*arguments)

    drain = process._drain
    monkeypatch.setattr(process, "_drain", late)
    source = "console.error('x'.repeat(300000));\nrequire('node:assert').equal(1, 2);"
    assert execute(Program(working("js", sandbox), source), sandbox).status == "AssertionError"


def test_a_compiler_that_runs_out_of_time_is_a_timeout(sandbox: Sandbox) -> None:
    language = working("cpp", sandbox)
    assert language.compile is not None
    slow = {"compile": [*language.compile, "-fconstexpr-ops-limit=999999999999"], "compile_seconds": 1.0}
    source = (
        "constexpr long f(long n) { return n < 2 ? n : f(n - 1) + f(n - 2); }\nconstexpr long x = f(60);\n"
        "int main() {}"
    )
    assert execute(Program(language.model_copy(update=slow), source), sandbox).status == "Timeout"
