"""Executes programs: compile, run, and one status for how each ended; many at once, and doubtful ones again
alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from flora_train.evaluation.code.programs.completion_proof import draw_nonce, with_evidence
from flora_train.evaluation.code.programs.languages import Language
from flora_train.evaluation.code.programs.process import Ended, run_command
from flora_train.evaluation.code.programs.sandbox import Limits, Sandbox
from flora_train.evaluation.code.programs.sandbox_paths import work_folder
from flora_train.runtime.environment import available_cpus

Status = Literal[
    "OK", "AssertionError", "Exception", "SyntaxError", "Timeout", "OutOfMemory", "SandboxViolation"
]
STATUSES: tuple[Status, ...] = get_args(Status)
PREPARED_BYTES = 1 << 30
"""Largest file that may be prepared; GCC's precompiled header has 100 MB."""
CPU_SIGNALS = (128 + 24, 128 + 9)
"""SIGXCPU, and SIGKILL a second later; an interpreter's own exit status may hide which."""
OUT_OF_MEMORY = (
    r"MemoryError|bad_alloc|OutOfMemoryError|not enough memory|[Oo]ut of memory|heap limit"
    r"|Cannot allocate memory|cannot allocate vector"
)
VIOLATION = (
    r"Read-only file system|Network is unreachable|Operation not permitted|Permission denied"
    r"|EACCES|EROFS|EPERM|ENETUNREACH"
)
COMPILER_KILLED = r"Killed signal terminated|CPU time limit exceeded|signal: killed"
"""Output of a compiler driver whose compiler exceeded its CPU time; the driver itself exits with 1."""
TAIL = 2000
"""Characters of the output that a verdict keeps."""
PROOF_TIME_FACTOR = 3
"""Multiple of its limit that the second run of a passing program may compute, so that a busy machine does not
fail it.
"""
CONTENTION_FACTOR = 2
"""Under contention a program may use this multiple of its CPU limit; beyond it, it times out."""


@dataclass(frozen=True)
class Program:
    """A program to be executed."""

    language: Language
    source: str
    """Prompt, completion and tests as one text."""
    tests: str = ""
    """The tests at the end of `source`, if a passing program must prove that it ran them."""

    @property
    def sha(self) -> str:
        """SHA-256 of language and source."""
        return sha256(f"{self.language.key}\x1f{self.source}".encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    status: Status
    exit: int
    """Exit status as the shell counts."""
    seconds: float
    """Elapsed seconds."""
    output: str
    """The end of its output."""
    reran_alone: bool = False
    """Whether it was late under contention, and therefore run again alone."""
    checks_ran: bool | None = None
    """Whether a second run printed the nonce after its last check and failed the added one; None if not
    tried.
    """


@dataclass(frozen=True)
class ProgramRun(Ended):
    """The result of compiling and running a program."""

    seconds: float = 0.0
    """Elapsed seconds, including compilation."""
    compiled: bool = True
    """Whether compilation succeeded; if not, all other fields are the compiler's."""


def execute(program: Program, sandbox: Sandbox) -> Verdict:
    """Compile and run one program in its own folder, without others at the same time."""
    return _execute(program, sandbox, 1)[0]


def execute_all(
    programs: Sequence[Program], sandbox: Sandbox, *, workers: int, report: Callable[[int, Verdict], None]
) -> None:
    """Call `report(i, verdict)` for programs[i] as verdicts arrive, in the calling thread.

    Equal programs run once.

    A program that is late under contention is run again alone, so that no verdict depends on other programs.
    One that computes CONTENTION_FACTOR times its limit times out in any case, and is not run again.
    """
    indices: dict[str, list[int]] = defaultdict(list)
    for i, program in enumerate(programs):
        indices[program.sha].append(i)
    programs = _without_unprovable_tests(programs, sandbox)
    doubtful_shas: list[str] = []

    def report_all(sha: str, verdict: Verdict) -> None:
        for i in indices[sha]:
            report(i, verdict)

    with ThreadPoolExecutor(workers) as pool:
        time_factor = CONTENTION_FACTOR if workers > 1 else 1
        running = {}
        for sha, same in indices.items():
            running[pool.submit(_execute, programs[same[0]], sandbox, time_factor)] = sha
        try:
            for future in as_completed(running):
                verdict, doubtful = future.result()
                if doubtful and workers > 1:
                    doubtful_shas.append(running[future])
                else:
                    report_all(running[future], verdict)
        except BaseException:  # Ctrl-C must not wait for running programs
            sandbox.stop.set()
            pool.shutdown(cancel_futures=True)
            sandbox.stop.clear()
            raise
    for sha in doubtful_shas:
        verdict = execute(programs[indices[sha][0]], sandbox)
        report_all(sha, replace(verdict, reran_alone=True))


def preflight(languages: Iterable[Language], sandbox: Sandbox) -> dict[str, str]:
    """Language key -> why it cannot be evaluated here, for languages that fail the check.

    A language works if its example of a passing program passes and its example of a failing program fails. As
    many programs run at once as there are CPUs.
    """
    languages = list(languages)
    programs: list[Program] = []
    for language in languages:
        programs += [Program(language, language.passing), Program(language, language.failing)]
    verdicts: dict[int, Verdict] = {}
    execute_all(programs, sandbox, workers=available_cpus(), report=verdicts.__setitem__)
    broken = {}
    for number, language in enumerate(languages):
        passing, failing = verdicts[2 * number], verdicts[2 * number + 1]
        if passing.status != "OK":
            error = (passing.output.strip().splitlines() or [passing.status])[-1]
            broken[language.key] = f"{language.name} does not run here ({error}): {language.how_to_install}"
        elif failing.status != "AssertionError":
            reason = f"{language.name} does not notice a failed check here ({failing.status})"
            broken[language.key] = f"{reason}: {language.how_to_install}"
    return broken


def classify(ended: Ended, language: Language) -> Status:
    """The status of a run, from its exit status and output."""
    output = ended.output + ended.errors
    if ended.over_memory:
        return "OutOfMemory"
    if _out_of_time(ended):
        return "Timeout"
    forbidden = language.never is not None and re.search(language.never, output)
    if ended.status == 0 and not forbidden and _has_passed(ended, language):
        return "OK"
    if ended.status == 0 and forbidden:
        return "Exception"
    if re.search(OUT_OF_MEMORY, output):
        return "OutOfMemory"
    if re.search(VIOLATION, output):
        return "SandboxViolation"
    return language.error_status(output)


def _has_passed(ended: Ended, language: Language) -> bool:
    """Whether the output of a program that exited with 0 is that of passing tests."""
    if language.quiet and ended.errors.strip():
        return False
    return language.says is None or re.search(language.says, ended.output + ended.errors) is not None


def _execute(program: Program, sandbox: Sandbox, time_factor: int) -> tuple[Verdict, bool]:
    """The verdict, and whether it might differ if run alone. time_factor: multiple of its limit that it may
    compute.
    """
    verdict, doubtful = _run_and_classify(program, sandbox, time_factor)
    if verdict.status == "OK" and not doubtful and program.tests:
        verdict = replace(verdict, checks_ran=_checks_ran(program, sandbox))
    return verdict, doubtful


def _run_and_classify(program: Program, sandbox: Sandbox, time_factor: int) -> tuple[Verdict, bool]:
    language = program.language
    ended = _run_program(program, sandbox, time_factor)
    if not ended.compiled:
        late = bool(_out_of_time(ended) or re.search(COMPILER_KILLED, ended.errors))
        return Verdict("Timeout" if late else "SyntaxError", ended.status, ended.wall, _tail(ended)), late
    # the kernel stops only the process that exceeds its limit, such as a command substituted by Bash; Bash
    # goes on
    limit = Limits(language.seconds).whole_cpu
    endless = ended.cpu >= time_factor * limit and not ended.over_memory
    status: Status = "Timeout" if endless else classify(ended, language)
    # elapsed time is at least CPU time; a program stopped earlier than that was stopped for another reason
    long_run = ended.wall > 0.9 * CONTENTION_FACTOR * language.seconds
    endless |= ended.status in CPU_SIGNALS and not ended.timed_out and long_run
    late = status == "Timeout" or ended.cpu >= limit or ended.wall > language.seconds
    return Verdict(status, ended.status, ended.seconds, _tail(ended)), late and not endless


def _checks_ran(program: Program, sandbox: Sandbox) -> bool | None:
    """Whether a passing program reaches the end of its checks, and fails one that is added there.

    None if its language or tests allow no such proof.
    """
    nonce = draw_nonce()
    source = with_evidence(program.language, program.source, tests=program.tests, nonce=nonce)
    if source is None:
        return None
    ended = _run_program(replace(program, source=source), sandbox, PROOF_TIME_FACTOR, hidden=True)
    # on its own line, as error messages of compilers and interpreters quote the source
    printed = re.search(rf"^{nonce}\r?$", f"{ended.output}\n{ended.errors}", re.MULTILINE) is not None
    if not printed or not ended.compiled:
        return False
    return classify(ended, program.language) not in ("OK", "Timeout", "OutOfMemory")


def _without_unprovable_tests(programs: Sequence[Program], sandbox: Sandbox) -> Sequence[Program]:
    """The programs, without `tests` if their language's own passing program has no proof here."""
    languages = {program.language.key: program.language for program in programs if program.tests}
    provable = {}
    for key, language in languages.items():
        provable[key] = _checks_ran(Program(language, language.passing, language.passing), sandbox)
    return [
        program if provable.get(program.language.key) else replace(program, tests="") for program in programs
    ]


def _run_program(program: Program, sandbox: Sandbox, time_factor: int, *, hidden: bool = False) -> ProgramRun:
    """hidden: prevent the program from reading its own source, as far as its language allows."""
    language = program.language
    argv, stdin = language.run, None
    with work_folder(confined=sandbox.kind == "bubblewrap") as name:
        folder = Path(name)
        file = folder / language.file
        if hidden and language.evidence is not None and language.evidence.run is not None:
            argv, stdin = language.evidence.run, program.source
        else:
            file.write_text(program.source, encoding="utf-8")
        sandbox.own(folder)
        command = _LanguageCommand(language, sandbox, folder)
        seconds = 0.0
        if language.compile is not None:
            ended = _compile(program, language.compile, command)
            seconds = ended.wall
            if ended.status or ended.timed_out:
                return ProgramRun(**vars(ended), seconds=seconds, compiled=False)
            if hidden:
                file.unlink(missing_ok=True)
        ended = command.run(argv, Limits(time_factor * language.seconds), stdin=stdin)
        return ProgramRun(**vars(ended), seconds=seconds + ended.wall)


def _compile(program: Program, argv: Sequence[str], command: _LanguageCommand) -> Ended:
    """Compile with what the language prepared, if it suits the program and preparing it succeeded."""
    language, prepare, cache = program.language, program.language.prepare, command.sandbox.prepared
    prepared = None
    if prepare is not None and re.match(prepare.when, program.source):

        def fill(folder: Path) -> bool:
            return _prepare(_LanguageCommand(language, command.sandbox, folder), prepare.command)

        prepared = cache.get(language.key, fill)
        if prepared is not None:
            argv = [*argv, *prepare.words]
    return command.run(argv, Limits(language.compile_seconds), writable=True, prepared=prepared)


def _prepare(command: _LanguageCommand, argv: Sequence[str]) -> bool:
    command.sandbox.own(command.folder)
    limits = Limits(command.language.compile_seconds, file=PREPARED_BYTES)
    ended = command.run(argv, limits, writable=True)
    return ended.status == 0 and not ended.timed_out


@dataclass(frozen=True)
class _LanguageCommand:
    """Runs commands of a language in a folder."""

    language: Language
    sandbox: Sandbox
    folder: Path

    def run(
        self,
        argv: Sequence[str],
        limits: Limits,
        *,
        writable: bool = False,
        prepared: Path | None = None,
        stdin: str | None = None,
    ) -> Ended:
        """Run one command, whose {file} is the language's source file."""
        argv = [word.replace("{file}", self.language.file) for word in argv]
        command = self.sandbox.command(
            argv, self.folder, limits, writable=writable, prepared=prepared, stdin=stdin
        )
        return run_command(command, limits.wall)


def _out_of_time(ended: Ended) -> bool:
    return ended.timed_out or ended.status in CPU_SIGNALS


def _tail(ended: Ended) -> str:
    return (ended.output + ended.errors)[-TAIL:]
