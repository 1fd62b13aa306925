"""Problems in MultiPL-E's prompt files, which are for evaluation only, never for training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from flora_train.config.errors import user_error
from flora_train.config.json_format import parse_json_at
from flora_train.config.language_names import language_key
from flora_train.config.terminal_text import plain

FIELDS = ("name", "prompt", "tests", "stop_tokens")
LONGEST_NAME = 200
"""Characters of a problem's name, which may become the name of a file."""


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
        """SHA-256 of everything that a verdict depends on besides the completion."""
        return sha256("\x1f".join((self.language, self.name, self.prompt, self.tests)).encode()).hexdigest()

    def cut(self, completion: str) -> str:
        """The completion up to its first stop token."""
        positions = [completion.find(stop) for stop in self.stop_tokens]
        cuts = [position for position in positions if position >= 0]
        return completion[: min(cuts, default=len(completion))]

    def program(self, completion: str) -> str:
        """The whole program of a completion."""
        return f"{self.prompt}{self.cut(completion)}\n{self.tests}"


def prompt_file(folder: Path, language: str) -> Path | None:
    """The folder's humaneval-<language>.jsonl, by any name of the language; None if there is none."""
    files = {path.stem.removeprefix("humaneval-"): path for path in sorted(folder.glob("humaneval-*.jsonl"))}
    if language in files:
        return files[language]
    others = (path for name, path in files.items() if language_key(name) == language_key(language))
    return next(others, None)


def load_problems(folder: Path, language: str) -> dict[str, Problem]:
    """Name -> problem, from `humaneval-<language>.jsonl`.

    Raises UserError if the file or a field is missing.
    """
    path = prompt_file(folder, language)
    if path is None:
        languages = sorted(p.stem.removeprefix("humaneval-") for p in folder.glob("humaneval-*.jsonl"))
        hint = f"no such file; the folder has prompts of {', '.join(languages) or 'no language'}"
        raise user_error(plain(str(folder / f"humaneval-{language}.jsonl")), None, hint)
    rows = []
    for number, line in enumerate(
        read_text(path).split("\n"), 1
    ):  # not splitlines: U+2028 may occur in a line
        if line.strip():
            location = f"{path}:{number}"
            rows.append((location, parse_json_at(location, line)))
    return problems_of_rows(language, rows)


def problems_of_rows(language: str, rows: Iterable[tuple[str, Any]]) -> dict[str, Problem]:
    """Name -> problem, from (location, MultiPL-E's mapping) rows.

    Raises UserError with the location of a row that lacks a field or repeats a name.
    """
    problems: dict[str, Problem] = {}
    for location, row in rows:
        if missing := [field for field in FIELDS if not isinstance(row, Mapping) or field not in row]:
            raise user_error(location, None, f"lacks {', '.join(missing)}: these are not MultiPL-E prompts")
        problem = problem_of(location, language, row)
        if problem.name in problems:
            raise user_error(location, problem.name, "occurs twice: names must be unique")
        problems[problem.name] = problem
    if not problems:
        raise user_error("evaluation.problems", language, "the prompt set is empty")
    return problems


def problem_of(location: str, language: str, row: Mapping[str, Any]) -> Problem:
    """MultiPL-E's mapping as a problem.

    Raises UserError, naming `location`, for a field that is not text, stop tokens that are not a list of
    texts, and a name that cannot be that of a file.
    """
    for field in ("name", "prompt", "tests"):
        if not isinstance(row[field], str):
            raise user_error(f"{location}: {field}", row[field], "must be text")
    stop_tokens = row.get("stop_tokens", ())
    if not isinstance(stop_tokens, (list, tuple)) or not all(
        isinstance(token, str) and token for token in stop_tokens
    ):
        hint = 'must be a list of texts that are not empty, such as ["\\n}"]'
        raise user_error(f"{location}: stop_tokens", stop_tokens, hint)
    name = whole_characters(row["name"])
    if not 0 < len(name) <= LONGEST_NAME or set(name) & set("/\\\0\n\r") or name in (".", ".."):
        hint = f"must be usable as a file name: 1 to {LONGEST_NAME} characters without / and line ends"
        raise user_error(f"{location}: name", row["name"], hint)
    prompt, tests = whole_characters(row["prompt"]), whole_characters(row["tests"])
    return Problem(language, name, prompt, tests, tuple(map(whole_characters, stop_tokens)))


def whole_characters(text: str) -> str:
    """Replace lone surrogates, which JSON can contain but no file."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError if it cannot be read or is not text."""
    if path.exists() and not path.is_file():
        raise user_error(str(path), None, "is not a regular file")  # reading a pipe may never end
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise user_error(str(path), None, f"is not text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise user_error(str(path), None, f"cannot be read ({error.strerror})") from error
