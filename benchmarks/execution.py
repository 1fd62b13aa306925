"""Speed and consistency of program execution: flora_train's executor beside MultiPL-E's own way, on the same
programs.

Programs are MultiPL-E problems of tests/fixtures with correct and wrong solutions, and programs that do not
parse, print 300 KB, or never end. Each has a number in a comment, so that no two are equal. Blocks of both
ways alternate; a figure is the median of the repeats. flora_train's executor then runs once more beside two
busy loops, which must not change a verdict. Prints Markdown, and writes it with `--save`.

Usage: python benchmarks/execution.py [--quick] [--repeats 3] [--save]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from reference_executor import run_like_the_reference

# isort: split
from flora_train.evaluation.code.problems.problem import Problem, load_problems
from flora_train.evaluation.code.programs.execute import Program, Verdict, execute_all, preflight
from flora_train.evaluation.code.programs.languages import Language, load_languages
from flora_train.evaluation.code.programs.sandbox import Sandbox, open_sandbox
from flora_train.runtime.environment import available_cpus, environment

RESULT = Path(__file__).parent / "results" / "execution.md"
FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "multipl_e_problems"
COUNTS = {"lua": 500, "cpp": 100}
QUICK = {"lua": 50, "cpp": 20}
SECONDS = 2.0
"""Limit of both ways: CPU time for flora_train, wall-clock time for the reference (whose own 15 s would only
slow it)."""
BLOCK = 50
HOGS = 2
DESERVED = {
    "right": "OK",
    "wrong": "AssertionError",
    "broken": "SyntaxError",
    "prints 300 KB": "OK",
    "never ends": "Timeout",
}
COMMENT = {"lua": "--", "cpp": "//"}
SPECIAL = {
    ("lua", "broken"): "  return )\nend",
    ("cpp", "broken"): "  return );",
    ("lua", "prints 300 KB"): "  io.write(string.rep('x', 300000))\n",
    ("cpp", "prints 300 KB"): "  std::cout << std::string(300000, 'x');\n",
    ("lua", "never ends"): "  while true do end\nend",
    ("cpp", "never ends"): "  for (volatile int i = 0;;) i = i + 1;",
}
VERSIONS = (["bwrap", "--version"], ["lua5.3", "-v"], ["g++", "--version"])


@dataclass(frozen=True)
class Case:
    """kind: key of DESERVED."""

    kind: str
    program: Program


@dataclass(frozen=True)
class Measured:
    """seconds: of each repeat, and of the run beside busy loops; verdicts: of each repeat, those beside busy
    loops last."""

    ours: list[float]
    theirs: list[float]
    beside_hogs: float
    our_verdicts: list[list[str]]
    their_verdicts: list[str]

    @property
    def ratio(self) -> float:
        """Median over pairs of runs."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs behind every figure")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK['lua']} Lua and {QUICK['cpp']} C++ programs, once"
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT} and the same as .json")
    options = parser.parse_args()
    languages = {key: load_languages()[key].model_copy(update={"seconds": SECONDS}) for key in COUNTS}
    if broken := preflight(languages.values(), open_sandbox("bubblewrap")):
        raise SystemExit("\n".join(broken.values()))
    repeats = 1 if options.quick else options.repeats
    cases = {key: make_cases(languages[key], (QUICK if options.quick else COUNTS)[key]) for key in COUNTS}
    measured = {key: measure(cases[key], repeats) for key in COUNTS}
    text = "\n".join(
        [*heading(repeats), *speed(cases, measured), *steadiness(cases, measured), *endings(cases, measured)]
    )
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")
        RESULT.with_suffix(".json").write_text(
            json.dumps(figures(cases, measured), indent=2) + "\n", encoding="utf-8"
        )


def make_cases(language: Language, count: int) -> list[Case]:
    """Of a hundred, one never ends, two print 300 KB, ten do not parse and 32 are wrong; of fewer, at least
    one of each."""
    problems = load_problems(FIXTURES, language.key)
    solutions = yaml.safe_load((FIXTURES / "solutions" / f"{language.key}.yaml").read_text(encoding="utf-8"))
    few = {"never ends": 1, "prints 300 KB": 2, "broken": 10, "wrong": 32}
    kinds = [kind for kind, share in few.items() for _ in range(max(1, share * count // 100))]
    kinds += ["right"] * (count - len(kinds))
    names = sorted(problems)
    cases = []
    for i in range(count):
        kind, name = (
            kinds[i * 37 % count],
            names[i % len(names)],
        )  # 37 has no factor in common with count: a fixed shuffle
        source = problems[name].program(completion(language.key, kind, problems[name], solutions))
        cases.append(Case(kind, Program(language, f"{source}\n{COMMENT[language.key]} {i}")))
    return cases


def completion(key: str, kind: str, problem: Problem, solutions: dict[str, dict[str, str]]) -> str:
    """The text between prompt and tests."""
    if kind in ("right", "wrong"):
        return solutions[problem.name][kind]
    return SPECIAL[key, kind] + (solutions[problem.name]["right"] if kind == "prints 300 KB" else "")


def measure(cases: Sequence[Case], repeats: int) -> Measured:
    """The order changes from block to block. flora_train prepares its sandbox and languages again in every
    repeat."""
    blocks = [[case.program for case in cases[at : at + BLOCK]] for at in range(0, len(cases), BLOCK)]
    ours, theirs, verdicts = [], [], []
    for _ in range(repeats):
        sandbox = open_sandbox("bubblewrap")
        our_seconds = their_seconds = 0.0
        our_verdicts: list[str] = []
        their_verdicts: list[str] = []
        for number, block in enumerate(blocks):
            for turn in (number, number + 1):
                started = time.perf_counter()
                if turn % 2:
                    their_verdicts += [run_like_the_reference(program) for program in block]
                    their_seconds += time.perf_counter() - started
                else:
                    our_verdicts += judge_block(block, sandbox)
                    our_seconds += time.perf_counter() - started
        ours.append(our_seconds)
        theirs.append(their_seconds)
        verdicts.append(our_verdicts)
    with hogs():
        sandbox = open_sandbox("bubblewrap")
        started = time.perf_counter()
        verdicts.append([status for block in blocks for status in judge_block(block, sandbox)])
        beside_hogs = time.perf_counter() - started
    return Measured(ours, theirs, beside_hogs, verdicts, their_verdicts)


def judge_block(programs: Sequence[Program], sandbox: Sandbox) -> list[str]:
    """As flora-train executes programs."""
    verdicts: dict[int, Verdict] = {}
    execute_all(programs, sandbox, workers=available_cpus(), report=verdicts.__setitem__)
    return [verdicts[i].status for i in range(len(programs))]


@contextmanager
def hogs() -> Iterator[None]:
    """Busy loops during a measurement."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(HOGS)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


Cases = dict[str, list[Case]]
Results = dict[str, Measured]


def heading(repeats: int) -> list[str]:
    facts = environment()
    versions = [
        subprocess.run(words, capture_output=True, text=True).stdout.splitlines()[0] for words in VERSIONS
    ]
    return [
        "# Judging programs: our executor beside MultiPL-E's way",
        "",
        f"{facts.machine.processor}, {available_cpus()} cores, Python {facts.python}, "
        f"{', '.join(versions)}, commit "
        f"{facts.commit}.",
        f"Median of {repeats} interleaved pair{'s' * (repeats > 1)} of runs. `python "
        "benchmarks/execution.py --save` prints this",
        f"file. Ours: {available_cpus()} programs at a time, each in its sandbox, C++ with a precompiled "
        "header (making it is in",
        "the time). The reference: one at a time without a sandbox, looked at every 0.1 s. Both stop a "
        "program after",
        f"{SECONDS:g} s (ours, beside others, after twice that; doubtful ones are run again alone); the "
        "reference's own limit of 15 s",
        "would make it slower yet. In every hundred programs one never ends.",
        "",
    ]


def speed(cases: Cases, measured: Results) -> list[str]:
    lines = ["| | programs | ours, programs/s | reference, programs/s | ratio |", "|---|---|---|---|---|"]
    for key, result in measured.items():
        n = len(cases[key])
        ours, theirs = n / statistics.median(result.ours), n / statistics.median(result.theirs)
        lines.append(f"| {name_of(cases[key])} | {n} | {ours:.1f} | {theirs:.1f} | {result.ratio:.1f} |")
    return [*lines, ""]


def steadiness(cases: Cases, measured: Results) -> list[str]:
    lines = [
        f"Ours beside {HOGS} busy loops, against the first quiet run; and among the quiet runs:",
        "",
        "| | programs/s beside them | verdicts that differ beside them | among quiet runs |",
        "|---|---|---|---|",
    ]
    for key, result in measured.items():
        first, *others = result.our_verdicts
        *quiet, loud = (sum(a != b for a, b in zip(first, other, strict=True)) for other in others)
        speed = len(cases[key]) / result.beside_hogs
        lines.append(
            f"| {name_of(cases[key])} | {speed:.1f} | {loud} | {sum(quiet) if quiet else '(one run)'} |"
        )
    return [*lines, ""]


def endings(cases: Cases, measured: Results) -> list[str]:
    """The expected verdict of each kind of program, and the verdicts of both ways."""
    lines = ["| | kind | programs | deserves | ours | reference |", "|---|---|---|---|---|---|"]
    for key, result in measured.items():
        for kind, deserved in DESERVED.items():
            at = [i for i, case in enumerate(cases[key]) if case.kind == kind]
            said = (
                words(verdicts[i] for i in at) for verdicts in (result.our_verdicts[0], result.their_verdicts)
            )
            lines.append(f"| {name_of(cases[key])} | {kind} | {len(at)} | {deserved} | {' | '.join(said)} |")
    return [
        *lines,
        "",
        (
            "Where they differ: the reference takes 1 KiB of output at each look, so that a program that "
            "prints 300 KB waits for its"
        ),
        "reader until its time is over, and is called a Timeout though it is right (with 15 s, too: a pipe "
        "holds 64 KiB, and 15 s",
        (
            "of looks take 150 KiB more). It has one word, Exception, for failed assertions and, in Lua, "
            "for what does not parse."
        ),
        "",
    ]


def words(statuses: Iterator[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in Counter(statuses).most_common())


def name_of(cases: Sequence[Case]) -> str:
    return cases[0].program.language.name


def figures(cases: Cases, measured: Results) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "environment": environment().model_dump(),
        **{
            key: {
                "programs": len(cases[key]),
                "seconds": result.ours,
                "reference_seconds": result.theirs,
                "ratio": result.ratio,
                "seconds_beside_hogs": result.beside_hogs,
                "verdicts_changed_by_load": sum(
                    a != b for a, b in zip(result.our_verdicts[0], result.our_verdicts[-1], strict=True)
                ),
            }
            for key, result in measured.items()
        },
    }


if __name__ == "__main__":
    main()
