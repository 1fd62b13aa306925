"""Verdict files: jsonl files that only grow.

Known verdicts are reused, and a file with other content is never changed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from flora_train.config.errors import UserError, user_error
from flora_train.evaluation.code.completion_files import Completion
from flora_train.evaluation.code.programs.early_exit import exits_early
from flora_train.evaluation.code.programs.execute import STATUSES, Program, Status, Verdict, execute_all
from flora_train.evaluation.code.programs.languages import Language
from flora_train.evaluation.code.programs.sandbox import Sandbox, SandboxKind
from flora_train.runtime.atomic import disk_errors
from flora_train.runtime.journal import whole_lines
from flora_train.runtime.progress import ProgressBar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Key = tuple[str, str, str, int]
"""(adapter, language, name, sample)"""
REMEDY = "move the file away, or choose another with --out"
TEXT = r'"(?:[^"\\]|\\.)*"'
LINE_START = ("adapter", TEXT), ("language", TEXT), ("name", TEXT), ("sample", r"\d+"), ("program", TEXT)
"""The keys that every line starts with, and patterns of their values."""
TEXT_FIELDS = ("adapter", "language", "name", "program", "sandbox", "status")
NUMBER_FIELDS = ("sample", "cpu_seconds")


class VerdictRecord(TypedDict):
    """A line of a verdict file."""

    adapter: str
    language: str
    name: str
    sample: int
    program: str
    """SHA-256 of the program."""
    sandbox: str
    cpu_seconds: float
    """CPU time limit of the program."""
    status: Status
    exit: NotRequired[int]
    seconds: NotRequired[float]
    output: NotRequired[str]
    again: NotRequired[bool]
    """Whether it was run again alone."""
    checks_ran: NotRequired[bool | None]
    suspicious: NotRequired[bool]
    """Whether a pass may be an early exit."""


def collect_verdicts(
    completions: Sequence[Completion],
    languages: Mapping[str, Language],
    sandbox: Sandbox,
    *,
    file: Path,
    workers: int,
) -> dict[Key, VerdictRecord]:
    """Key -> verdict record of every completion, from `file` or by execution; new verdicts are appended to
    it.

    Raises UserError and leaves the file unchanged if it contains anything but verdicts, or a verdict on
    another program with the same key, or if another process is writing to it.
    """
    programs = {}
    for completion in completions:
        problem = completion.problem
        source = problem.program(completion.text)
        programs[completion.key] = Program(languages[problem.language], source, problem.tests)
    texts = {completion.key: completion.problem.cut(completion.text) for completion in completions}
    check_verdicts(completions, languages, sandbox.kind, file=file)
    with disk_errors(file), _locked(file) as descriptor:
        # once more, now that the file is locked
        known = check_verdicts(completions, languages, sandbox.kind, file=file)
        missing = [key for key in programs if key not in known]
        os.truncate(file, len(whole_lines(file.read_bytes())))
        done = 0

        def report(i: int, verdict: Verdict) -> None:
            nonlocal done
            key = missing[i]
            record = _record(key, programs[key], sandbox.kind, verdict=verdict, completion=texts[key])
            os.write(descriptor, (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
            known[key] = record
            done += 1
            progress.update(done)

        with ProgressBar("execute", max(1, len(missing))) as progress:
            execute_all([programs[key] for key in missing], sandbox, workers=workers, report=report)
    return {key: known[key] for key in programs}


def check_verdicts(
    completions: Sequence[Completion], languages: Mapping[str, Language], sandbox: SandboxKind, *, file: Path
) -> dict[Key, VerdictRecord]:
    """The records of a file to which verdicts on these completions can be appended.

    Raises UserError otherwise.
    """
    known = read_verdicts(file, sandbox, languages)
    for completion in completions:
        key, problem = completion.key, completion.problem
        sha = Program(languages[problem.language], problem.program(completion.text)).sha
        if key in known and known[key]["program"] != sha:
            hint = f"is the key of a verdict on another completion or prompt: {REMEDY}"
            raise user_error(str(file), "/".join(map(str, key)), hint)
    return known


def read_verdicts(
    file: Path, sandbox: SandboxKind, languages: Mapping[str, Language]
) -> dict[Key, VerdictRecord]:
    """Key -> verdict record. A last line that was cut off by a kill is ignored.

    Raises UserError for other content, verdicts of another sandbox, or other CPU time limits than `languages`
    have.
    """
    if not file.exists():
        if file.is_symlink():
            raise user_error(str(file), None, f"is a link to a missing file: {REMEDY}")
        return {}
    if not file.is_file():
        raise user_error(str(file), None, f"is not a file: {REMEDY}")
    with disk_errors(file):
        content = file.read_bytes()
    whole = whole_lines(content)
    if not _is_partial_verdict(content[len(whole) :].decode("utf-8", "replace")):
        raise user_error(str(file), None, f"does not contain verdicts: {REMEDY}")
    known: dict[Key, VerdictRecord] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        location = f"{file}:{number}"
        record = _parse(location, line)
        known[record["adapter"], record["language"], record["name"], record["sample"]] = record
        language, seconds = languages.get(record["language"]), record["cpu_seconds"]
        if record["sandbox"] != sandbox:
            hint = f"is the sandbox of this verdict, and now it is {sandbox}: {REMEDY}"
            raise user_error(location, record["sandbox"], hint)
        if language is not None and seconds != language.seconds:
            hint = f"was the CPU time limit (s) of this program; {language.name} now has {language.seconds:g}"
            location = f"{location}: cpu_seconds"
            raise user_error(location, seconds, f"{hint}: give the same cpu_seconds, or {REMEDY}")
    return known


def have_other_limits(file: Path, sandbox: SandboxKind, languages: Mapping[str, Language]) -> bool:
    """Whether a verdict in the file is of another sandbox or CPU time limit. Lines that are not verdicts are
    ignored."""
    if not file.is_file():
        return False
    for line in whole_lines(file.read_bytes()).split(b"\n")[:-1]:
        try:
            record = _parse(str(file), line)
        except UserError:
            continue
        language = languages.get(record["language"])
        if record["sandbox"] != sandbox or (
            language is not None and record["cpu_seconds"] != language.seconds
        ):
            return True
    return False


def _is_partial_verdict(text: str) -> bool:
    """Whether a last line without line end may be the start of a verdict; only such a line may be removed."""
    separator = "{"
    for key, pattern in LINE_START:
        start = f'{separator}"{key}": '
        if not text.startswith(start):
            return start.startswith(text)
        text, separator = text[len(start) :], ", "
        match = re.match(pattern, text)
        if match is None:
            return not text or (pattern == TEXT and text.startswith('"'))
        text = text[match.end() :]
    return True


def _parse(location: str, line: bytes) -> VerdictRecord:
    try:
        record = json.loads(line.decode("utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, not JSON, or JSON nested a thousand levels deep
        raise user_error(location, None, f"is not a verdict: {REMEDY}") from error
    if not _is_verdict(record):
        raise user_error(location, None, f"is not a verdict: {REMEDY}")
    return cast(VerdictRecord, record)


def _is_verdict(record: Any) -> bool:
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in TEXT_FIELDS):
        return False
    if not all(type(record.get(name)) in (int, float) for name in NUMBER_FIELDS):
        return False
    return type(record["sample"]) is int and record["status"] in STATUSES


def _record(
    key: Key, program: Program, sandbox: SandboxKind, *, verdict: Verdict, completion: str
) -> VerdictRecord:
    adapter, language, name, sample = key
    return {
        "adapter": adapter,
        "language": language,
        "name": name,
        "sample": sample,
        "program": program.sha,
        "sandbox": sandbox,
        "cpu_seconds": program.language.seconds,
        "status": verdict.status,
        "exit": verdict.exit,
        "seconds": verdict.seconds,
        "output": verdict.output,
        "again": verdict.reran_alone,
        "checks_ran": verdict.checks_ran,
        "suspicious": verdict.status == "OK" and _is_early_exit(verdict, program.language, completion),
    }


def _is_early_exit(verdict: Verdict, language: Language, completion: str) -> bool:
    """Whether a pass may be an early exit: by its proof, or by its words if no proof is possible."""
    if verdict.checks_ran is None:
        return exits_early(language, completion)
    return not verdict.checks_ran


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    """A file descriptor for appending to the file, locked against other processes.

    Raises UserError if one has the lock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    no_follow = 0 if file.is_symlink() else getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | no_follow, 0o666)
    try:
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = (
                "another process is writing verdicts to it: wait until it ends, or choose another file "
                "with --out"
            )
            raise user_error(str(file), None, hint) from error
        except OSError:  # a file system without locks
            pass
        yield descriptor
    finally:
        os.close(descriptor)
