"""Verdicts in a jsonl file that only grows: what was judged is not judged again, nothing is mixed, and a file of another kind is
never changed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flora_train.config.errors import user_error
from flora_train.evaluation.code.completion_files import Completion
from flora_train.evaluation.code.programs.early_exit import exits_early
from flora_train.evaluation.code.programs.execute import STATUSES, Program, Verdict, execute_all
from flora_train.evaluation.code.programs.languages import Language
from flora_train.evaluation.code.programs.sandbox import Kind, Sandbox
from flora_train.runtime.atomic import disk_errors
from flora_train.runtime.progress import ProgressBar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Key = tuple[str, str, str, int]
ANOTHER = "move the file away, or give another out="
KEY_FIELDS = ("adapter", "language", "name", "sample")
BEGINNING = ("adapter", TEXT := r'"(?:[^"\\]|\\.)*"'), ("language", TEXT), ("name", TEXT), ("sample", r"\d+"), ("program", TEXT)
"""The keys that every line here begins with, and what their values match."""
TEXTS = ("adapter", "language", "name", "program", "sandbox", "status")
NUMBERS = ("sample", "cpu_seconds")


def collect_verdicts(
    completions: Sequence[Completion], languages: Mapping[str, Language], sandbox: Sandbox, file: Path, workers: int
) -> dict[Key, dict[str, Any]]:
    """Key -> verdict record of every completion. Those that `file` holds already are taken from it, the others are run and
    appended as they end. Raises UserError, with the file as it was, if it holds anything else than verdicts, or a verdict on another
    program under the same key, or if another process writes to it."""
    programs = {c.key: Program(languages[c.problem.language], c.problem.program(c.text), c.problem.tests) for c in completions}
    texts = {c.key: c.problem.cut(c.text) for c in completions}
    check_verdicts(completions, languages, sandbox.kind, file)
    with disk_errors(file), _claimed(file) as out:
        known = check_verdicts(completions, languages, sandbox.kind, file)  # once more: nobody else writes now
        todo = [key for key in programs if key not in known]
        os.truncate(file, len(_whole(file.read_bytes())))
        done = 0

        def report(i: int, verdict: Verdict) -> None:
            nonlocal done
            key = todo[i]
            record = dict(zip(KEY_FIELDS, key, strict=True))
            record |= {"program": programs[key].sha, "sandbox": sandbox.kind, "cpu_seconds": programs[key].language.seconds}
            record |= verdict.record()
            record["suspicious"] = verdict.status == "OK" and _suspicious(verdict, programs[key].language, texts[key])
            os.write(out, (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
            known[key] = record
            done += 1
            watch.update(done)

        with ProgressBar("execute", max(1, len(todo))) as watch:
            execute_all([programs[key] for key in todo], sandbox, workers, report)
    return {key: known[key] for key in programs}


def check_verdicts(
    completions: Sequence[Completion], languages: Mapping[str, Language], sandbox: Kind, file: Path
) -> dict[Key, dict[str, Any]]:
    """What `file` holds, if verdicts on these completions can be appended to it. Raises UserError otherwise, and changes nothing."""
    known = read_verdicts(file, sandbox, languages)
    for completion in completions:
        key, problem = completion.key, completion.problem
        sha = Program(languages[problem.language], problem.program(completion.text)).sha
        if key in known and known[key]["program"] != sha:
            words = f"holds the verdict on another completion or prompt of this key: {ANOTHER}"
            raise user_error(str(file), "/".join(map(str, key)), words)
    return known


def read_verdicts(file: Path, sandbox: Kind, languages: Mapping[str, Language]) -> dict[Key, dict[str, Any]]:
    """Key -> verdict record; a last line that a kill cut short is no verdict. Raises UserError for a file that holds anything else,
    for verdicts of another sandbox, or of another time limit than `languages` have."""
    if not file.exists():
        if file.is_symlink():
            raise user_error(str(file), None, f"is a link to nothing: {ANOTHER}")
        return {}
    if not file.is_file():
        raise user_error(str(file), None, f"is no file: {ANOTHER}")
    with disk_errors(file):
        content = file.read_bytes()
    whole = _whole(content)
    if not _is_cut_verdict(content[len(whole) :].decode("utf-8", "replace")):
        raise user_error(str(file), None, f"holds no verdicts: {ANOTHER}")
    known: dict[Key, dict[str, Any]] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        record = _record(f"{file}:{number}", line)
        known[record["adapter"], record["language"], record["name"], record["sample"]] = record
        language, seconds = languages.get(record["language"]), record["cpu_seconds"]
        if record["sandbox"] != sandbox:
            raise user_error(f"{file}:{number}", record["sandbox"], f"was judged in another sandbox than {sandbox}: {ANOTHER}")
        if language is not None and seconds != language.seconds:
            words = f"is the time (s) that this program might compute; {language.name} now has {language.seconds:g}"
            raise user_error(f"{file}:{number}: cpu_seconds", seconds, f"{words}: give the same cpu_seconds, or {ANOTHER}")
    return known


def _is_cut_verdict(rest: str) -> bool:
    """Whether a last line without an end may be the beginning of a verdict: only such a line is taken back."""
    opening = "{"
    for key, value in BEGINNING:
        start = f'{opening}"{key}": '
        if not rest.startswith(start):
            return start.startswith(rest)
        rest, opening = rest[len(start) :], ", "
        match = re.match(value, rest)
        if match is None:
            return (value == TEXT and rest[:1] in ("", '"')) or not rest
        rest = rest[match.end() :]
    return True


def _record(at: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, or JSON a thousand levels deep
        raise user_error(at, None, f"is no verdict: {ANOTHER}") from error
    texts = isinstance(record, dict) and all(isinstance(record.get(name), str) for name in TEXTS)
    numbers = texts and all(type(record.get(name)) in (int, float) for name in NUMBERS)
    if not numbers or type(record["sample"]) is not int or record["status"] not in STATUSES:
        raise user_error(at, None, f"is no verdict: {ANOTHER}")
    return record


def _suspicious(verdict: Verdict, language: Language, completion: str) -> bool:
    """Of a pass: the evidence decides, and words only where there can be none."""
    return exits_early(language, completion) if verdict.checks_ran is None else not verdict.checks_ran


@contextmanager
def _claimed(file: Path) -> Iterator[int]:
    """A descriptor that appends to the file, which no other process claims meanwhile. Raises UserError if one has."""
    file.parent.mkdir(parents=True, exist_ok=True)
    follow = 0 if file.is_symlink() else getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | follow, 0o666)
    try:
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise user_error(
                str(file), None, "another process writes verdicts there now: wait for it, or give another out="
            ) from error
        except OSError:  # a file system without locks
            pass
        yield descriptor
    finally:
        os.close(descriptor)


def _whole(content: bytes) -> bytes:
    """Up to the last line end."""
    return content[: content.rfind(b"\n") + 1]
