"""Which problems are there? MultiPL-E's prompt files as they are: for evaluation only, never for training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from flora_train.config.errors import fail, first_line
from flora_train.data.strict_json import read_json

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

    def cut(self, completion: str) -> str:
        """The completion up to the earliest stop token in it."""
        cuts = [at for stop in self.stop_tokens if (at := completion.find(stop)) >= 0]
        return completion[: min(cuts, default=len(completion))]

    def program(self, completion: str) -> str:
        """The whole program, of a completion as it was generated."""
        return f"{self.prompt}{self.cut(completion)}\n{self.tests}"


def load_problems(folder: Path, language: str) -> dict[str, Problem]:
    """Name -> problem, from `humaneval-<language>.jsonl`. Raises UserError if the file or a field is missing."""
    path = folder / f"humaneval-{language}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(p.stem.removeprefix("humaneval-") for p in folder.glob("humaneval-*.jsonl"))) or "none"
        raise fail(str(path), None, f"no such file; the folder has prompts of {there}")
    try:
        lines = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)  # U+2028 may stand inside a line
    except (OSError, UnicodeDecodeError) as error:
        raise fail(str(path), None, f"is not UTF-8 text that can be read: {first_line(error)}") from None
    return problems_of_rows(language, ((f"{path}:{n}", _parsed(path, n, line)) for n, line in lines if line.strip()))


def problems_of_rows(language: str, rows: Iterable[tuple[str, Any]]) -> dict[str, Problem]:
    """rows: (where it stands, MultiPL-E's mapping). Raises UserError naming the place of a row that lacks a field or repeats a
    name."""
    found: dict[str, Problem] = {}
    for at, row in rows:
        if missing := [field for field in FIELDS if not isinstance(row, dict) or field not in row]:
            raise fail(at, None, f"lacks {', '.join(missing)}: these are not MultiPL-E prompts")
        if wrong := next((field for field in FIELDS[:3] if not isinstance(row[field], str)), None):
            raise fail(at, row[wrong], f"{wrong} must be text")
        name, prompt, tests = (as_text(row[field]) for field in FIELDS[:3])
        problem = Problem(language, name, prompt, tests, stop_tokens(row["stop_tokens"], at))
        if problem.name in found:
            raise fail(at, problem.name, "stands twice: names are keys")
        found[problem.name] = problem
    if not found:
        raise fail("evaluation.problems", language, "the prompt set is empty")
    return found


def stop_tokens(value: Any, at: str) -> tuple[str, ...]:
    """A problem's stop tokens. Raises UserError, naming the place `at`, unless they are a list of texts: text itself would end a
    completion at each of its letters, and an empty one before its first."""
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) and word for word in value):
        raise fail(at, value, 'stop_tokens must be a list of texts, none of them empty, such as ["\\nend"]')
    return tuple(map(as_text, value))


def as_text(value: str) -> str:
    """JSON can spell half a character (a lone surrogate), which no file takes."""
    return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return read_json(line)
    except ValueError as error:
        raise fail(f"{path}:{number}", None, str(error)) from error
