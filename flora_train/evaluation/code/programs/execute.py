"""What becomes of a program? Compile, run, one word for how it ended; many at once, and doubtful ones again on a quiet machine."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from flora_train.evaluation.code.programs.completion_proof import draw_nonce, with_evidence
from flora_train.evaluation.code.programs.languages import Language
from flora_train.evaluation.code.programs.process import Ended, run_command
from flora_train.evaluation.code.programs.sandbox import Limits, Sandbox
from flora_train.evaluation.code.programs.sandbox_paths import work_folder
from flora_train.runtime.environment import available_cpus

Status = Literal["OK", "AssertionError", "Exception", "SyntaxError", "Timeout", "OutOfMemory", "SandboxViolation"]
STATUSES: tuple[Status, ...] = ("OK", "AssertionError", "Exception", "SyntaxError", "Timeout", "OutOfMemory", "SandboxViolation")
PREPARED_BYTES = 1 << 30
"""The largest file that may be prepared; GCC's precompiled header has 100 MB."""
CPU_SIGNALS = (128 + 24, 128 + 9)
"""SIGXCPU, and SIGKILL a second later; an interpreter's own exit may hide which."""
OUT_OF_MEMORY = r"MemoryError|bad_alloc|OutOfMemoryError|not enough memory|[Oo]ut of memory|heap limit|Cannot allocate memory|cannot allocate vector"
VIOLATION = (
    r"Read-only file system|Network is unreachable|Operation not permitted|Permission denied|EACCES|EROFS|EPERM|ENETUNREACH"
)
COMPILER_KILLED = r"Killed signal terminated|CPU time limit exceeded|signal: killed"
"""What a driver says whose compiler proper ran out of time; it exits with 1 itself."""
TAIL = 2000
PROOF_TIME_FACTOR = 3
"""Times the limit that the second run of a passing program may compute: it must not miss its evidence on a busy machine."""
CONTENTION_FACTOR = 2
"""Beside others a program may compute so many times its limit, for it then computes slower. Who needs more is out of time."""


@dataclass(frozen=True)
class Program:
    """source: prompt, completion and tests, as one text. tests: those with which `source` ends, where it is to be found out whether
    a passing program ran them."""

    language: Language
    source: str
    tests: str = ""

    @property
    def sha(self) -> str:
        """The same text in the same language is the same program."""
        return sha256(f"{self.language.key}\x1f{self.source}".encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """seconds: on the clock; output: the end of what it said; reran_alone: beside others it was late, and it was run alone. checks_ran:
    whether a second run, of the same program with a nonce and a check that fails after its last check, showed both; None where
    that was not tried."""

    status: Status
    exit: int
    seconds: float
    output: str
    reran_alone: bool = False
    checks_ran: bool | None = None

    def record(self) -> dict[str, Any]:
        """As it is written to a verdict file."""
        record = asdict(self)
        record["again"] = record.pop("reran_alone")
        return record


def execute(program: Program, sandbox: Sandbox) -> Verdict:
    """Compile and run one program in a folder of its own, with nothing beside it."""
    return _execute(program, sandbox, 1)[0]


def _execute(program: Program, sandbox: Sandbox, patience: int) -> tuple[Verdict, bool]:
    """The verdict, and whether it might be another one alone. patience: times the limit that it may compute."""
    verdict, doubtful = _run_and_classify(program, sandbox, patience)
    if verdict.status == "OK" and not doubtful and program.tests:
        verdict = replace(verdict, checks_ran=_checks_ran(program, sandbox))
    return verdict, doubtful


def _checks_ran(program: Program, sandbox: Sandbox) -> bool | None:
    """Whether a passing program comes to the end of its checks and fails one that is added there. It may take longer than it
    took to pass. None where its tests have no place for that."""
    nonce = draw_nonce()
    changed = with_evidence(program.language, program.source, program.tests, nonce)
    if changed is None:
        return None
    ended = _run_program(replace(program, source=changed), sandbox, PROOF_TIME_FACTOR, hidden=True)
    # alone on its line, for a compiler's or an interpreter's message quotes what it complains of
    shown = re.search(rf"^{nonce}\r?$", f"{ended.output}\n{ended.errors}", re.MULTILINE) is not None
    return shown and ended.compiled and classify(ended, program.language) not in ("OK", "Timeout", "OutOfMemory")


def _run_and_classify(program: Program, sandbox: Sandbox, patience: int) -> tuple[Verdict, bool]:
    language = program.language
    ended = _run_program(program, sandbox, patience)
    if not ended.compiled:
        late = bool(_out_of_time(ended) or re.search(COMPILER_KILLED, ended.errors))
        return Verdict("Timeout" if late else "SyntaxError", ended.status, ended.wall, _tail(ended)), late
    # the kernel stops only the process that computes too long, such as a command that Bash substitutes; Bash goes on
    limit = Limits(language.seconds).whole_cpu
    endless = ended.cpu >= patience * limit and not ended.over_memory
    status = "Timeout" if endless else classify(ended, language)
    # on the clock it takes at least as long as it computes; what stopped it earlier than that was something else
    endless |= ended.status in CPU_SIGNALS and not ended.timed_out and ended.wall > 0.9 * CONTENTION_FACTOR * language.seconds
    doubtful = not endless and (status == "Timeout" or ended.cpu >= limit or ended.wall > language.seconds)
    return Verdict(status, ended.status, ended.seconds, _tail(ended)), doubtful


@dataclass(frozen=True)
class Ran(Ended):
    """seconds: on the clock, compiling included; compiled: it was run, and if not, all else is of the compiler."""

    seconds: float = 0.0
    compiled: bool = True


def _run_program(program: Program, sandbox: Sandbox, patience: int, hidden: bool = False) -> Ran:
    """hidden: it cannot read its own source, as far as its language allows."""
    language = program.language
    command, stdin = language.run, None
    with work_folder(confined=sandbox.kind == "bubblewrap") as name:
        folder = Path(name)
        file = folder / language.file
        if hidden and language.evidence is not None and language.evidence.run is not None:
            command, stdin = language.evidence.run, program.source
        else:
            file.write_text(program.source, encoding="utf-8")
        sandbox.own(folder)
        seconds = 0.0
        if language.compile is not None:
            ended = _compile(program, language.compile, folder, sandbox)
            seconds = ended.wall
            if ended.status or ended.timed_out:
                return Ran(**vars(ended), seconds=seconds, compiled=False)
            if hidden:
                file.unlink(missing_ok=True)
        ended = _run(command, language, folder, sandbox, Limits(patience * language.seconds), stdin=stdin)
        return Ran(**vars(ended), seconds=seconds + ended.wall)


def classify(ended: Ended, language: Language) -> Status:
    """One word for how a run ended."""
    said = ended.output + ended.errors
    if ended.over_memory:
        return "OutOfMemory"
    if _out_of_time(ended):
        return "Timeout"
    quiet = not (language.quiet and ended.errors.strip())
    refused = language.never is not None and re.search(language.never, said)
    if ended.status == 0 and quiet and not refused and (language.says is None or re.search(language.says, said)):
        return "OK"
    if ended.status == 0 and refused:
        return "Exception"
    if re.search(OUT_OF_MEMORY, said):
        return "OutOfMemory"
    if re.search(VIOLATION, said):
        return "SandboxViolation"
    return language.meaning(said)  # type: ignore[return-value]


def execute_all(programs: Sequence[Program], sandbox: Sandbox, workers: int, report: Callable[[int, Verdict], None]) -> None:
    """Call `report(i, verdict)` for programs[i] as verdicts come, from this thread. Equal programs run once. What is late beside
    others is run again alone, so that no verdict depends on what else ran; what computes CONTENTION_FACTOR times its limit, and goes on, is
    out of time wherever it runs."""
    same: dict[str, list[int]] = defaultdict(list)
    for i, program in enumerate(programs):
        same[program.sha].append(i)
    programs = _without_evidence_that_fails_here(programs, sandbox)
    late: list[str] = []

    def tell(sha: str, verdict: Verdict) -> None:
        for i in same[sha]:
            report(i, verdict)

    with ThreadPoolExecutor(workers) as pool:
        patience = CONTENTION_FACTOR if workers > 1 else 1
        running = {pool.submit(_execute, programs[places[0]], sandbox, patience): sha for sha, places in same.items()}
        try:
            for done in as_completed(running):
                verdict, doubtful = done.result()
                if doubtful and workers > 1:
                    late.append(running[done])
                else:
                    tell(running[done], verdict)
        except BaseException:  # Ctrl-C does not wait for the programs that run
            sandbox.stop.set()
            pool.shutdown(cancel_futures=True)
            sandbox.stop.clear()
            raise
    for sha in late:
        tell(sha, replace(execute(programs[same[sha][0]], sandbox), reran_alone=True))


def _without_evidence_that_fails_here(programs: Sequence[Program], sandbox: Sandbox) -> Sequence[Program]:
    """No evidence is asked of programs of a language whose known pass does not give it on this machine."""
    languages = {program.language.key: program.language for program in programs if program.tests}
    sure = {key: _checks_ran(Program(found, found.passing, found.passing), sandbox) for key, found in languages.items()}
    return [program if sure.get(program.language.key) else replace(program, tests="") for program in programs]


def preflight(languages: Iterable[Language], sandbox: Sandbox) -> dict[str, str]:
    """Language key -> why it cannot be evaluated here: its known program does not pass, or its known failure does. A language
    that works is absent. As many programs run at once as there are CPUs."""
    languages = list(languages)
    programs: list[Program] = []
    for language in languages:
        programs += [Program(language, language.passing), Program(language, language.failing)]
    verdicts: dict[int, Verdict] = {}
    execute_all(programs, sandbox, available_cpus(), verdicts.__setitem__)
    broken = {}
    for number, language in enumerate(languages):
        passing, failing = verdicts[2 * number], verdicts[2 * number + 1]
        if passing.status != "OK":
            last = (passing.output.strip().splitlines() or [passing.status])[-1]
            broken[language.key] = f"{language.name} does not run here ({last}): {language.how_to_install}"
        elif failing.status != "AssertionError":
            broken[language.key] = (
                f"{language.name} does not notice a failed check here ({failing.status}): {language.how_to_install}"
            )
    return broken


def _compile(program: Program, words: Sequence[str], folder: Path, sandbox: Sandbox) -> Ended:
    """With what the language prepared, where that suits the program; without it where preparing failed."""
    language, prepare = program.language, program.language.prepare
    prepared = None
    if prepare is not None and re.match(prepare.when, program.source):
        prepared = sandbox.prepared.get(language.key, lambda empty: _prepared(language, prepare.command, empty, sandbox))
        words = words if prepared is None else [*words, *prepare.words]
    return _run(words, language, folder, sandbox, Limits(language.compile_seconds), writable=True, prepared=prepared)


def _prepared(language: Language, command: Sequence[str], folder: Path, sandbox: Sandbox) -> bool:
    sandbox.own(folder)
    ended = _run(command, language, folder, sandbox, Limits(language.compile_seconds, file=PREPARED_BYTES), writable=True)
    return ended.status == 0 and not ended.timed_out


def _run(
    words: Sequence[str],
    language: Language,
    folder: Path,
    sandbox: Sandbox,
    limits: Limits,
    writable: bool = False,
    prepared: Path | None = None,
    stdin: str | None = None,
) -> Ended:
    command = [word.replace("{file}", language.file) for word in words]
    return run_command(sandbox.command(command, folder, limits, writable, prepared, stdin), limits.wall)


def _out_of_time(ended: Ended) -> bool:
    return ended.timed_out or ended.status in CPU_SIGNALS


def _tail(ended: Ended) -> str:
    return (ended.output + ended.errors)[-TAIL:]
