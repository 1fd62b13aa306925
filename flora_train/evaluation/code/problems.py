"""Which problems are there? MultiPL-E's prompt files as they are: for evaluation only, never for training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from flora_train.config.errors import fail

FIELDS = ("name", "prompt", "tests", "stop_tokens")


@dataclass(frozen=True)
class Problem:
    """A program is prompt + completion + tests; a completion ends before the first of `stop_tokens`."""

    language: str
    name: str
    prompt: str
    tests: str
    stop_tokens: tuple[str, ...]

    @property
    def sha(self) -> str:
        """Of all that a verdict depends on besides the completion."""
        return sha256("\x1f".join((self.language, self.name, self.prompt, self.tests)).encode()).hexdigest()

    def program(self, completion: str) -> str:
        """The whole program. The completion is cut at the earliest stop token in it."""
        cuts = [at for stop in self.stop_tokens if (at := completion.find(stop)) >= 0]
        return f"{self.prompt}{completion[: min(cuts, default=len(completion))]}\n{self.tests}"


def load_problems(folder: Path, language: str) -> dict[str, Problem]:
    """Name -> problem, from `humaneval-<language>.jsonl`. Raises UserError if the file or a field is missing."""
    path = folder / f"humaneval-{language}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(p.stem.removeprefix("humaneval-") for p in folder.glob("humaneval-*.jsonl"))) or "none"
        raise fail(str(path), None, f"no such file; the folder has prompts of {there}")
    found: dict[str, Problem] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = _row(path, number, line)
        stop_tokens: Sequence[str] = row["stop_tokens"]  # type: ignore[assignment]
        problem = Problem(language, str(row["name"]), str(row["prompt"]), str(row["tests"]), tuple(stop_tokens))
        if problem.name in found:
            raise fail(f"{path}:{number}", problem.name, "stands twice: names are keys")
        found[problem.name] = problem
    return found


def _row(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise fail(f"{path}:{number}", None, f"is no JSON: {error}") from error
    if missing := [field for field in FIELDS if not isinstance(row, dict) or field not in row]:
        raise fail(f"{path}:{number}", None, f"lacks {', '.join(missing)}: these are not MultiPL-E prompts")
    return row
