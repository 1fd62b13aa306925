"""A pass without proof that its checks ran is flagged; a correct solution never is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import settings

from flora_train.evaluation.code.completion_files import Completion, read_completions
from flora_train.evaluation.code.problems.problem import Problem, load_problems
from flora_train.evaluation.code.programs import execute as execute_module
from flora_train.evaluation.code.programs.completion_proof import draw_nonce, with_evidence
from flora_train.evaluation.code.programs.execute import Program, Verdict, execute, execute_all
from flora_train.evaluation.code.programs.languages import Language, load_languages
from flora_train.evaluation.code.programs.process import Ended
from flora_train.evaluation.code.programs.sandbox import Sandbox
from flora_train.evaluation.code.programs.verdicts import collect_verdicts
from tests.unit.evaluation.code.conftest import working

FIXTURES = Path(__file__).parents[4] / "fixtures"
PROBLEMS = FIXTURES / "multipl_e_problems"
MAX_ELEMENT = "HumanEval_35_max_element"
FAKES = {
    "lua": [
        "  return 0\nend\nos['exit'](0)",
        "  return 0\nend --[[ ]] os.exit(0)",
        "  return 0\nend\nassert = function() end require('luaunit').assertEquals = assert",
        "  return 0\nend\nload('os.ex' .. 'it(0)')()",
        "  return 0\nend\n_G['o' .. 's']['ex' .. 'it'](0)",
        "  return 0\nend\npackage.loaded.luaunit = { LuaUnit = { run = function() return 0 end } }",
        "  return 0\nend\ndo local leave = os.exit; os.exit = function() leave(0) end end",
    ],
    "pl": [
        "    return 0;\n}\nEND { $? = 0 }",
        "    return 0;\n}\nBEGIN { *CORE::GLOBAL::exit = sub { CORE::exit(0) } }",
        "    eval 'ex' . 'it 0';\n}",
        "    require POSIX; &{'POSIX::_ex' . 'it'}(0);\n}",
    ],
    "rb": [
        "  Process.send('ex' + 'it!', 0)\nend",
        "  0\nend\nat_exit { Process.send('ex' + 'it!', 0) }",
        "  0\nend\nrequire 'test/unit'\nTest::Unit::AutoRunner.need_auto_run = false",
        "  0\nend\nrequire 'test/unit'\nmodule Test::Unit::Assertions\n  def assert_equal(*) end\nend",
    ],
    "js": [
        "  globalThis['proc' + 'ess']['ex' + 'it'](0);\n}",
        "  return 0;\n}\nrequire('node:assert').deepEqual = () => {};",
        "  return 0;\n}\nprocess.on('uncaughtException', () => {});",
        "  return 0;\n}\nprocess.on('exit', () => { process.exitCode = 0; process.reallyExit(0); });",
    ],
    "py": [
        "    getattr(__import__('os'), '_ex' + 'it')(0)",
        "    import sys, os\n    sys.excepthook = lambda *_: getattr(os, '_ex' + 'it')(0)\n    return 0",
        "    import atexit, os\n    atexit.register(getattr(os, '_ex' + 'it'), 0)\n    return 0",
    ],
    "php": [
        (
            "    return 0;\n}\nset_exception_handler(function () {}); register_shutdown_function(fn () => "
            "exit(0));"
        ),
        "    eval('ex' . 'it(0);');\n}",
    ],
    "cpp": [
        "    return 0; }\n#undef assert\n#define assert(x)\nlong unused() {",
        "    return 0; }\nstruct Leave { Leave() { (std::_Exit)(0); } } leave; long unused() {",
    ],
}
"""Language -> completions of HumanEval_35 that pass, mostly without a word that the flag of words looks
for."""
ADD: dict[str, tuple[str, str, str, list[str]]] = {
    "sh": (
        "add() {\n",
        (
            '}\n\ncandidate() {\n    add "$@"\n}\n\nset -e\nrun_test() {\n'
            '    [[ $(candidate "1" "2") = "3" ]]\n}\n\nrun_test\n'
        ),
        "    echo $(($1 + $2))",
        [
            "    echo 0\n}\ntrap 'exit 0' EXIT\nunused() {\n:",
            "    echo 3\n}\nset() {\n:",
            "    echo 0\n}\ne''xit\nunused() {\n:",
        ],
    ),
    "r": (
        "add <- function(x, y) {",
        (
            "test_humaneval <- function() {\n    candidate <- add\n"
            "    stopifnot(isTRUE(all.equal(candidate(1, 2), 3)))\n}\ntest_humaneval()"
        ),
        "\n    x + y\n}",
        [
            "\n    0\n}\nstopifnot <- function(...) NULL",
            "\n    0\n}\nall.equal <- function(...) TRUE",
            "\n    0\n}\noptions(error = quote(base::quit(status = 0)))",
            "\n    do.call(paste0('qu', 'it'), list(status = 0))\n}",
        ],
    ),
    "ml": (
        "let add (x : int) (y : int) : int =",
        "let assertions =\n let candidate = add in\n  (assert ((candidate 1 2) = 3));\n  ()\n",
        " x + y",
        [" 0\nlet (=) _ _ = true", " 0\nlet () = Stdlib.exit 0"],
    ),
    "rkt": (
        "#lang racket\n(define (add x y)",
        (
            "(require rackunit)\n\n(define (test-humaneval)\n\n  (let (( candidate add))\n"
            "    (check-equal? (candidate 1 2) 3)\n))\n\n(test-humaneval)"
        ),
        " (+ x y))",
        [" 0)\n((eval 'exit (make-base-namespace)) 0)"],
    ),
    "rs": (
        "fn add(x: isize, y: isize) -> isize {",
        "}\n\nfn main() {\n    let candidate = add;\n    assert_eq!(candidate(1, 2), 3);\n}",
        " x + y",
        [
            " 0 }\n#[allow(unused_macros)] macro_rules! assert_eq { ($($x:tt)*) => {} }\nfn unused() {",
            ' unsafe { extern "C" { fn _exit(x: i32); } _exit(0) }; x',
        ],
    ),
    "go": (
        'package add_test\n\nimport (\n    "testing"\n    "fmt"\n)\n\nfunc add(x int, y int) int {',
        "func TestAdd(t *testing.T) {\n  candidate := add\n\ttype test struct {\n\t\tactual   interface{}\n"
        "\t\texpected interface{}\n\t}\n"
        "   tests := []test{\n     { actual: candidate(1, 2), expected: 3 },\n   }\n\n"
        "\tfor i, tc := range tests {\n"
        '\t\tt.Run(fmt.Sprintf("test num % d", i), func(t *testing.T) {\n'
        '\t\t\tif fmt.Sprintf("%v", tc.actual) != fmt.Sprintf("%v", tc.expected) {\n'
        "\t\t\t\tt.Errorf(\"expected '%s', got '%s'\", tc.expected, tc.actual)\n\t\t\t}\n\t\t})\n\t}\n}\n",
        "\n    return x + y\n}",
        ["\n    return 0\n}\nfunc TestMain(m *testing.M) {\n}"],
    ),
    "d": (
        "import std.math;\nlong add(long x, long y) ",
        "unittest\n{\n    alias candidate = add;\n\n    assert(candidate(1L, 2L) == 3L);\n}\nvoid main(){}",
        "{\n    return x + y;\n}",
        [
            "{ return 0; }\nvoid main() {}\n__EOF__",
            (
                "{ return 0; }\nshared static this() { import core.runtime; Runtime.moduleUnitTester = () => "
                "true; }"
            ),
        ],
    ),
    "java": (
        "import java.util.*;\nclass Problem {\n    public static long add(long x, long y) {",
        (
            "    }\n    public static void main(String[] args) {\n    assert(add((1l), "
            "(2l)) == (3l));\n    }\n\n}\n"
        ),
        "\n        return x + y;",
        [
            " Thread.setDefaultUncaughtExceptionHandler((t, e) -> Runtime.getRuntime().halt(0)); return 0;",
            ' try { Class.forName("java.lang." + "Sys" + "tem").getMethod("ex" + "it", '
            "int.class).invoke(null, 0); }"
            " catch (Exception e) { } return 0;",
        ],
    ),
    "ts": (
        "function add(x: number, y: number): number {",
        "declare var require: any;\nconst assert = require('node:assert');\n\n\nfunction test() {\n"
        "  let candidate = add;\n"
        "  assert.deepEqual(candidate(1, 2),3);\n}\n\ntest();",
        "\n  return x + y;\n}",
        [
            "\n  return 0;\n}\nrequire('node:assert').deepEqual = () => {};",
            "\n  (globalThis as any)['pro' + 'cess']['ex' + 'it'](0);\n  return 0;\n}",
        ],
    ),
    "cs": (
        (
            "using System;\nusing System.Diagnostics;\nusing System.Linq;\nclass Problem {\n"
            "    public static long Add(long x, long y) {"
        ),
        (
            "    }\n    public static void Main(string[] args) {\n"
            "    Debug.Assert(Add((1L), (2L)) == (3L));\n    }\n\n}\n"
        ),
        "\n        return x + y;",
        [
            (
                " return 0; }\n    class Debug { public static void Assert(bool holds) { } }\n"
                "    static void Unused() {"
            ),
            ' typeof(Environment).GetMethod("Ex" + "it").Invoke(null, new object[] { 0 }); return 0;',
        ],
    ),
    "elixir": (
        "defmodule HumanEval do\n  def add(x, y) do",
        'ExUnit.start()\n\ndefmodule HumanEvalTest do\n  use ExUnit.Case, async: true\n  test "add" do\n'
        "    candidate = &HumanEval.add/2\n    assert 3 == candidate.(1, 2)\n  end\nend\n",
        "\n    x + y\n  end\nend",
        [
            "\n    _ = x + y\n    0\n  end\nend\nSystem.at_exit(fn _ -> apply(System, :halt, [0]) end)",
            "\n    apply(:erlang, :halt, [x + y - 3])\n  end\nend",
        ],
    ),
    "clj": (
        "(defn add\n  [x y]\n",
        "(require '[clojure.test :refer [deftest is run-test]])\n\n(def candidate add)\n\n"
        "(deftest test-humaneval\n\n"
        "  (is (= (candidate 1 2) 3))\n)\n\n(run-test test-humaneval)",
        "  (+ x y))",
        ['  0)\n(println "0 failures, 0 errors")'],
    ),
    "hs": (
        "import System.Exit\nimport System.IO.Unsafe (unsafePerformIO)\nadd :: Int -> Int -> Int\nadd x y =",
        (
            "\nmain :: IO ()\nmain = do\n  let candidate = add\n"
            '  if candidate 1 2 == 3 then pure () else error "assertion failed"\n  pure ()\n'
        ),
        " x + y",
        [" unsafePerformIO exitSuccess"],
    ),
    "scala": (
        "object Problem {\n    def add(x : Long, y : Long) : Long = {",
        "    }\n    def main(args: Array[String]) = {\n    assert(add((1L), (2L)) == (3L))\n    }\n\n}\n",
        "\n        x + y",
        [" 0 }\n    def assert(holds: Boolean): Unit = {}\n    def unused() = {"],
    ),
    "ada": (
        "package Placeholder is\n   function Add (X : Integer; Y : "
        "Integer) return Integer;\nend Placeholder;\n\n"
        "package body Placeholder is\n   function Add (X : Integer; Y : Integer) return Integer",
        "\n   end Add;\n\nend Placeholder;\n\nwith Placeholder; use Placeholder;\n\nprocedure Main is\n\n"
        "   function Candidate (X : Integer; Y : Integer) return Integer renames Placeholder.Add;\n\nbegin\n"
        "   pragma Assert (Candidate (1, 2) = 3);\nend Main;",
        " is\n   begin\n      return X + Y;",
        [
            ' is\n      procedure Leave (Status : Integer);\n      pragma Import (C, Leave, "_exit");\n'
            "   begin\n      Leave (X - 1);\n"
            "      return Y;",
        ],
    ),
}
"""Language -> prompt, tests as MultiPL-E writes them, a right completion, and wrong ones that pass."""


SLOW = ("scala", "clj", "java", "go", "ts", "rkt", "elixir", "rs", "cs")
"""Languages whose programs take seconds: with the attack suite only."""


def verdict_on(key: str, completion: str, sandbox: Sandbox) -> Verdict:
    prompt, tests, _, _ = ADD[key]
    problem = Problem(key, "add", prompt, tests, ())
    return execute(Program(working(key, sandbox), problem.program(completion), problem.tests), sandbox)


@pytest.mark.attack
@pytest.mark.parametrize("key", ADD)
def test_a_correct_solution_has_evidence_and_a_fake_has_none(key: str, sandbox: Sandbox) -> None:
    if key in SLOW and settings.get_current_profile_name() != "attack":
        pytest.skip("takes long: make test-attack")
    _, _, right, fakes = ADD[key]
    verdict = verdict_on(key, right, sandbox)
    assert (verdict.status, verdict.checks_ran) == ("OK", True), verdict
    for fake in fakes:
        verdict = verdict_on(key, fake, sandbox)
        assert (verdict.status, verdict.checks_ran) == ("OK", False), (fake, verdict)


@pytest.mark.parametrize("key", FAKES)
def test_evidence_is_missing_where_checks_were_avoided(key: str, sandbox: Sandbox) -> None:
    language, problem = working(key, sandbox), load_problems(PROBLEMS, key)[MAX_ELEMENT]
    verdicts: dict[int, Verdict] = {}
    programs = [Program(language, problem.program(fake), problem.tests) for fake in FAKES[key]]
    execute_all(programs, sandbox, workers=2, report=verdicts.__setitem__)
    for number, fake in enumerate(FAKES[key]):
        assert (verdicts[number].status, verdicts[number].checks_ran) == ("OK", False), (
            fake,
            verdicts[number],
        )


@pytest.mark.parametrize("key", ["lua", "pl", "rb", "js", "py", "php"])
def test_the_source_that_a_program_could_read_has_no_evidence_in_it(key: str, sandbox: Sandbox) -> None:
    """The program of the second run lists all that its folder and its standard input hold."""
    language, problem = working(key, sandbox), load_problems(PROBLEMS, key)[MAX_ELEMENT]
    assert language.evidence is not None
    assert language.evidence.run is not None
    look = ["sh", "-c", f"{' '.join(language.evidence.run)}; ls -A; cat; exit 3"]
    looking = language.model_copy(update={"evidence": language.evidence.model_copy(update={"run": look})})
    seen: list[Ended] = []

    def keep(ended: Ended, language: Language) -> str:
        seen.append(ended)
        return "OK"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute_module, "classify", keep)
        execute(Program(looking, problem.program(RIGHT[key]), problem.tests), sandbox)
    assert language.file not in seen[1].output
    assert problem.prompt not in seen[1].output


RIGHT = {
    "lua": "  return math.max(table.unpack(l))\nend",
    "pl": "    my ($m, @r) = @$l; for (@r) { $m = $_ if $_ > $m } return $m;\n}",
    "rb": "  l.max\nend",
    "js": "  return Math.max(...l);\n}",
    "py": "    return max(l)",
    "php": "    return max($l);\n}",
}


def test_the_program_that_decides_the_verdict_is_not_changed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    language, problem = working("py", sandbox), load_problems(PROBLEMS, "py")[MAX_ELEMENT]
    source = problem.program("    print(open(__file__).read())\n    return max(l)")
    verdict = execute(Program(language, source, problem.tests), sandbox)
    assert (verdict.status, verdict.checks_ran) == (
        "OK",
        False,
    )  # in the second run there is no file that it could read
    assert verdict.output.endswith(problem.tests[-1000:] + "\n")


def test_a_failing_program_is_not_run_twice(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    language, problem = working("lua", sandbox), load_problems(PROBLEMS, "lua")[MAX_ELEMENT]
    monkeypatch.setattr(execute_module, "with_evidence", lambda *_, **__: pytest.fail("it did not pass"))
    verdict = execute(Program(language, problem.program("  return 0\nend"), problem.tests), sandbox)
    assert (verdict.status, verdict.checks_ran) == ("AssertionError", None)


def test_early_exit_words_are_used_only_without_a_position_for_evidence(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    language = working("lua", sandbox)
    problem = Problem("lua", "p", "local function f()\n", "assert(f() == 1)", ())
    texts = ["  return 1\nend os.exit(0)", "  return 1\nend", "  return 1\nend os['exit'](0)"]
    completions = [Completion("a", problem, i, text) for i, text in enumerate(texts)]
    records = collect_verdicts(completions, {"lua": language}, sandbox, file=tmp_path / "v.jsonl", workers=1)
    assert [(r["status"], r["checks_ran"], r["suspicious"]) for r in records.values()] == [
        ("OK", None, True),
        ("OK", None, False),
        ("OK", None, False),
    ]


def test_evidence_overrides_early_exit_words(tmp_path: Path, sandbox: Sandbox) -> None:
    """A right solution with a word that ends programs is not flagged, and a fake without one is."""
    language, problem = working("lua", sandbox), load_problems(PROBLEMS, "lua")[MAX_ELEMENT]
    right = "  if #l > 1000 then os.exit(0) end\n" + RIGHT["lua"]
    completions = [Completion("a", problem, i, text) for i, text in enumerate([right, *FAKES["lua"][:2]])]
    records = list(
        collect_verdicts(
            completions, {"lua": language}, sandbox, file=tmp_path / "v.jsonl", workers=2
        ).values()
    )
    assert [record["status"] for record in records] == ["OK"] * 3
    assert [record["suspicious"] for record in records] == [False, True, True]


def test_no_pass_is_flagged_on_a_machine_where_evidence_does_not_work(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    language, problem = working("lua", sandbox), load_problems(PROBLEMS, "lua")[MAX_ELEMENT]
    assert language.evidence is not None
    broken = language.model_copy(
        update={"evidence": language.evidence.model_copy(update={"run": ["no-such-program"]})}
    )
    completions = [Completion("a", problem, 0, RIGHT["lua"])]
    (record,) = collect_verdicts(
        completions, {"lua": broken}, sandbox, file=tmp_path / "v.jsonl", workers=1
    ).values()
    assert (record["status"], record["checks_ran"], record["suspicious"]) == ("OK", None, False)


def test_every_language_has_evidence() -> None:
    for key, language in load_languages().items():
        assert language.evidence is not None
        nonce = draw_nonce()
        changed = with_evidence(language, language.passing, tests=language.passing, nonce=nonce)
        assert changed is not None, key
        assert changed.count(nonce) == 2 or key in ("ada",), key
        assert re.sub(f".*{nonce}.*", "", changed) != language.passing
        assert with_evidence(language, "x", tests=language.passing, nonce=nonce) is None


def test_evidence_is_put_into_the_tests_of_every_multipl_e_fixture() -> None:
    languages = load_languages()
    for completion in read_completions(FIXTURES / "multipl_e", None):
        language, problem = languages[completion.problem.language], completion.problem
        source = problem.program(completion.text)
        changed = with_evidence(language, source, tests=problem.tests, nonce="n" * 32)
        assert changed is not None
        assert changed.startswith(source.removesuffix(problem.tests))
