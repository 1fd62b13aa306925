"""What becomes of a program? Compile, run, one word for how it ended; many at once, and timeouts once more on a quiet machine."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from flora_train.evaluation.code.languages import Language
from flora_train.evaluation.code.process import Ended, run_command
from flora_train.evaluation.code.sandbox import Limits, Sandbox

Status = Literal["OK", "AssertionError", "Exception", "SyntaxError", "Timeout", "OutOfMemory", "SandboxViolation"]
STATUSES: tuple[Status, ...] = ("OK", "AssertionError", "Exception", "SyntaxError", "Timeout", "OutOfMemory", "SandboxViolation")
CPU_SIGNALS = (128 + 24, 128 + 9)
"""SIGXCPU, and SIGKILL a second later; an interpreter's own exit may hide which."""
OUT_OF_MEMORY = r"MemoryError|bad_alloc|OutOfMemoryError|not enough memory|[Oo]ut of memory|heap limit|Cannot allocate memory|cannot allocate vector"
VIOLATION = (
    r"Read-only file system|Network is unreachable|Operation not permitted|Permission denied|EACCES|EROFS|EPERM|ENETUNREACH"
)
TAIL = 2000


@dataclass(frozen=True)
class Program:
    """source: prompt, completion and tests, as one text."""

    language: Language
    source: str

    @property
    def sha(self) -> str:
        """The same text in the same language is the same program."""
        return sha256(f"{self.language.key}\x1f{self.source}".encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """seconds: on the clock; output: the end of what it said; again: it timed out beside others and was run alone."""

    status: Status
    exit: int
    seconds: float
    output: str
    again: bool = False

    def record(self) -> dict[str, Any]:
        """As it is written down."""
        return asdict(self)


def execute(program: Program, sandbox: Sandbox) -> Verdict:
    """Compile and run one program in a folder of its own."""
    language = program.language
    with tempfile.TemporaryDirectory(prefix="flora-train-") as name:
        folder = Path(name)
        (folder / language.file).write_text(program.source, encoding="utf-8")
        sandbox.own(folder)
        seconds = 0.0
        if language.compile is not None:
            ended = _run(language.compile, language, folder, sandbox, language.compile_seconds, writable=True)
            seconds = ended.wall
            if ended.status or ended.timed_out:
                status: Status = "Timeout" if _out_of_time(ended) else "SyntaxError"
                return Verdict(status, ended.status, seconds, _tail(ended))
        ended = _run(language.run, language, folder, sandbox, language.seconds)
        return Verdict(judge(ended, language), ended.status, seconds + ended.wall, _tail(ended))


def judge(ended: Ended, language: Language) -> Status:
    """One word for how a run ended."""
    said = ended.output + ended.errors
    if _out_of_time(ended):
        return "Timeout"
    quiet = not (language.quiet and ended.errors.strip())
    if ended.status == 0 and quiet and (language.says is None or re.search(language.says, said)):
        return "OK"
    if re.search(OUT_OF_MEMORY, said):
        return "OutOfMemory"
    if re.search(VIOLATION, said):
        return "SandboxViolation"
    return language.meaning(said)  # type: ignore[return-value]


def execute_all(programs: Sequence[Program], sandbox: Sandbox, workers: int, report: Callable[[int, Verdict], None]) -> None:
    """Call `report(i, verdict)` for programs[i] as verdicts come, from this thread. Equal programs run once. What times out
    beside others is run again alone, so that no verdict depends on what else ran."""
    same: dict[str, list[int]] = defaultdict(list)
    for i, program in enumerate(programs):
        same[program.sha].append(i)
    late: list[str] = []

    def tell(sha: str, verdict: Verdict) -> None:
        for i in same[sha]:
            report(i, verdict)

    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(execute, programs[places[0]], sandbox): sha for sha, places in same.items()}
        try:
            for done in as_completed(running):
                verdict = done.result()
                if verdict.status == "Timeout" and workers > 1:
                    late.append(running[done])
                else:
                    tell(running[done], verdict)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for sha in late:
        tell(sha, replace(execute(programs[same[sha][0]], sandbox), again=True))


def preflight(languages: Iterable[Language], sandbox: Sandbox) -> dict[str, str]:
    """Language key -> why it cannot be evaluated here: its known program does not pass, or its known failure does. A language
    that works is absent."""
    broken = {}
    for language in languages:
        passing = execute(Program(language, language.passing), sandbox)
        if passing.status != "OK":
            last = (passing.output.strip().splitlines() or [passing.status])[-1]
            broken[language.key] = f"{language.name} does not run here ({last}): {language.how_to_install}"
        elif (failing := execute(Program(language, language.failing), sandbox)).status != "AssertionError":
            broken[language.key] = (
                f"{language.name} does not notice a failed check here ({failing.status}): {language.how_to_install}"
            )
    return broken


def _run(
    words: Sequence[str], language: Language, folder: Path, sandbox: Sandbox, seconds: float, writable: bool = False
) -> Ended:
    limits = Limits(cpu=seconds)
    command = [word.replace("{file}", language.file) for word in words]
    return run_command(sandbox.command(command, folder, limits, writable), folder, limits.wall)


def _out_of_time(ended: Ended) -> bool:
    return ended.timed_out or ended.status in CPU_SIGNALS


def _tail(ended: Ended) -> str:
    return (ended.output + ended.errors)[-TAIL:]
