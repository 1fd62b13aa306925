"""Where do verdicts stand? In a jsonl file that only grows: what was judged is not judged again, and nothing is mixed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_train.atomic import disk_errors
from flora_train.config.errors import fail
from flora_train.evaluation.code.completions import Completion
from flora_train.evaluation.code.programs.execute import Program, Verdict, execute_all
from flora_train.evaluation.code.programs.languages import Language
from flora_train.evaluation.code.programs.sandbox import Kind, Sandbox
from flora_train.evaluation.code.programs.suspicious import ends_early
from flora_train.training.progress import Watch

Key = tuple[str, str, str, int]
ANOTHER = "move the file away, or give another out="


def judge_all(
    completions: Sequence[Completion], languages: Mapping[str, Language], sandbox: Sandbox, file: Path, workers: int
) -> dict[Key, dict[str, Any]]:
    """Key -> verdict record of every completion. Those that `file` holds already are taken from it, the others are run and
    appended as they end. Raises UserError if the file holds a verdict on another program under the same key."""
    programs = {c.key: Program(languages[c.problem.language], c.problem.program(c.text)) for c in completions}
    texts = {c.key: c.problem.cut(c.text) for c in completions}
    known = read_verdicts(file, sandbox.kind, languages)
    for key, program in programs.items():
        if key in known and known[key]["program"] != program.sha:
            words = f"holds the verdict on another completion or prompt of this key: {ANOTHER}"
            raise fail(str(file), "/".join(map(str, key)), words)
    todo = [key for key in programs if key not in known]
    with disk_errors(file), file.open("a", encoding="utf-8") as out, Watch("execute", max(1, len(todo))) as watch:
        done = 0

        def report(i: int, verdict: Verdict) -> None:
            nonlocal done
            key = todo[i]
            record = dict(zip(("adapter", "language", "name", "sample"), key, strict=True))
            record |= {"program": programs[key].sha, "sandbox": sandbox.kind, "cpu_seconds": programs[key].language.seconds}
            record |= verdict.record()
            record["suspicious"] = verdict.status == "OK" and ends_early(programs[key].language, texts[key])
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()
            known[key] = record
            done += 1
            watch.update(done)

        execute_all([programs[key] for key in todo], sandbox, workers, report)
    return {key: known[key] for key in programs}


def read_verdicts(file: Path, sandbox: Kind, languages: Mapping[str, Language]) -> dict[Key, dict[str, Any]]:
    """Key -> verdict record; a last line that a kill cut short is taken away. Raises UserError for verdicts of another sandbox, or
    of another time limit than `languages` have."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as cut:
            cut.truncate(len(whole))
    known: dict[Key, dict[str, Any]] = {}
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            known[record["adapter"], record["language"], record["name"], record["sample"]] = record
            language, seconds = languages.get(record["language"]), record["cpu_seconds"]
        except (json.JSONDecodeError, KeyError) as error:
            raise fail(f"{file}:{number}", None, f"is no verdict: {ANOTHER}") from error
        if record["sandbox"] != sandbox:
            raise fail(f"{file}:{number}", record["sandbox"], f"was judged in another sandbox than {sandbox}: {ANOTHER}")
        if language is not None and seconds != language.seconds:
            words = f"is the time (s) that this program might compute; {language.name} now has {language.seconds:g}"
            raise fail(f"{file}:{number}: cpu_seconds", seconds, f"{words}: give the same cpu_seconds, or {ANOTHER}")
    return known
