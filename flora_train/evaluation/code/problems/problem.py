"""Which problems are there? MultiPL-E's prompt files as they are: for evaluation only, never for training."""

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
"""Characters; a problem's completions may be written to a file of its name."""


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


def prompt_file(folder: Path, language: str) -> Path | None:
    """The folder's humaneval-<language>.jsonl, by whatever word for the language; None if it has none."""
    there = {path.stem.removeprefix("humaneval-"): path for path in sorted(folder.glob("humaneval-*.jsonl"))}
    others = (path for word, path in there.items() if language_key(word) == language_key(language))
    return there.get(language) or next(others, None)


def load_problems(folder: Path, language: str) -> dict[str, Problem]:
    """Name -> problem, from `humaneval-<language>.jsonl`. Raises UserError if the file or a field is missing."""
    path = prompt_file(folder, language)
    if path is None:
        there = ", ".join(sorted(p.stem.removeprefix("humaneval-") for p in folder.glob("humaneval-*.jsonl"))) or "none"
        raise user_error(
            plain(str(folder / f"humaneval-{language}.jsonl")), None, f"no such file; the folder has prompts of {there}"
        )
    lines = enumerate(read_text(path).split("\n"), 1)  # U+2028 may stand inside a line
    return problems_of_rows(language, ((f"{path}:{n}", parse_json_at(f"{path}:{n}", line)) for n, line in lines if line.strip()))


def problems_of_rows(language: str, rows: Iterable[tuple[str, Any]]) -> dict[str, Problem]:
    """rows: (where it stands, MultiPL-E's mapping). Raises UserError naming the place of a row that lacks a field or repeats a
    name."""
    found: dict[str, Problem] = {}
    for at, row in rows:
        if missing := [field for field in FIELDS if not isinstance(row, Mapping) or field not in row]:
            raise user_error(at, None, f"lacks {', '.join(missing)}: these are not MultiPL-E prompts")
        problem = problem_of(at, language, row)
        if problem.name in found:
            raise user_error(at, problem.name, "stands twice: names are keys")
        found[problem.name] = problem
    if not found:
        raise user_error("evaluation.problems", language, "the prompt set is empty")
    return found


def problem_of(at: str, language: str, row: Mapping[str, Any]) -> Problem:
    """MultiPL-E's mapping as a problem. Raises UserError, which names `at`, for a field that is no text, for stop tokens that are
    no list of texts, and for a name that could not be a file's."""
    for field in ("name", "prompt", "tests"):
        if not isinstance(row[field], str):
            raise user_error(f"{at}: {field}", row[field], "must be text")
    stop_tokens = row.get("stop_tokens", ())
    if not isinstance(stop_tokens, (list, tuple)) or not all(isinstance(token, str) and token for token in stop_tokens):
        raise user_error(f"{at}: stop_tokens", stop_tokens, 'must be a list of texts, none of them empty (["\\n}"])')
    name = whole_characters(row["name"])
    if not 0 < len(name) <= LONGEST_NAME or set(name) & set("/\\\0\n\r") or name in (".", ".."):
        words = f"must be usable as a file name: 1 to {LONGEST_NAME} characters without / and line ends"
        raise user_error(f"{at}: name", row["name"], words)
    prompt, tests = whole_characters(row["prompt"]), whole_characters(row["tests"])
    return Problem(language, name, prompt, tests, tuple(map(whole_characters, stop_tokens)))


def whole_characters(text: str) -> str:
    """JSON can spell half a character, which no file takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_text(path: Path) -> str:
    """Raises UserError for a file that cannot be read or is no text."""
    if path.exists() and not path.is_file():
        raise user_error(str(path), None, "is no regular file")  # a pipe may never end
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise user_error(str(path), None, f"is no text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise user_error(str(path), None, f"cannot be read ({error.strerror})") from error
