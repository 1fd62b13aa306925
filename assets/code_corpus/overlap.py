"""Finds evaluation problems in an example, by the name of a function or by its description."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

RUN_WORDS = 8

_PROBLEM_NAME = re.compile(r"HumanEval_\d+_(\w+)")
_WORD = re.compile(r"[a-z]+")
# the result on the line after `>>>` belongs to the example
_DOCTEST = re.compile(r"^[^\w\n]*>>>[^\n]*(?:\n[^\n]*)?", re.MULTILINE)
_COMMENT = re.compile(
    r'"""(.*?)"""|/\*(.*?)\*/|\(\*(.*?)\*\)|((?:^[ \t]*(?:--+|//+|#+(?!include)|;+|%+)[^\n]*\n?)+)',
    re.S | re.M,
)


class OverlapError(Exception):
    """Problem files that cannot be used; the text is the one line that is printed."""


@dataclass
class Problems:
    """What must not occur in training data."""

    names: dict[str, str] = field(default_factory=dict)
    """Normalised function name -> problem."""

    runs: dict[tuple[str, ...], str] = field(default_factory=dict)
    """`RUN_WORDS` consecutive words of a description -> problem."""

    count: int = 0
    """Problems that were added; those of MultiPL-E once for every language."""

    def add(self, problem: str, name: str, description: str) -> None:
        """Add one problem with its function's name and what it says in words."""
        self.count += 1
        self.names.setdefault(normalised_name(name), problem)
        for run in word_runs(description):
            self.runs.setdefault(run, problem)

    def named_in(self, text: str, defined_name: re.Pattern[str]) -> str | None:
        """The problem whose function `text` defines, or None; a group of `defined_name` holds a defined
        name."""
        for match in defined_name.finditer(text) if self.names else ():
            for name in match.groups():
                if name and normalised_name(name) in self.names:
                    return self.names[normalised_name(name)]
        return None

    def described_in(self, text: str) -> str | None:
        """The problem that shares `RUN_WORDS` consecutive words with `text`, or None."""
        return (
            next((self.runs[run] for run in word_runs(text) if run in self.runs), None) if self.runs else None
        )


def normalised_name(name: str) -> str:
    """Spelling of a function name that `has_close_elements` and `hasCloseElements` share."""
    return name.replace("_", "").lower()


def word_runs(text: str) -> Iterator[tuple[str, ...]]:
    """All runs of `RUN_WORDS` consecutive lower-case words; digits and signs between them do not count."""
    words = _WORD.findall(text.lower())
    return (tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1))


def description(prompt: str) -> str:
    """The comments of a MultiPL-E prompt without their `>>>` examples."""
    return "\n".join(
        _DOCTEST.sub("", part) for match in _COMMENT.finditer(prompt) for part in match.groups() if part
    )


def add_prompts(problems: Problems, folder: Path) -> None:
    """Add every problem in MultiPL-E's files (`*.jsonl`, or `*.json` with one problem) in `folder`."""
    before = problems.count
    texts = [
        line
        for file in sorted(folder.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    texts += [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.json"))]
    for text in texts:
        row = json.loads(text)
        if match := _PROBLEM_NAME.fullmatch(row.get("name", "")):
            problems.add(row["name"], match[1], description(row["prompt"]))
    if problems.count == before:
        raise OverlapError(
            f"{folder}: no *.jsonl or *.json with names such as HumanEval_0_has_close_elements"
        )


def add_starter_problems(problems: Problems, file: Path) -> None:
    """Add every problem of a YAML file with the key `problems`: a list with `name` and `doc`."""
    listed = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("problems")
    if not listed:
        raise OverlapError(f"{file}: no list `problems`")
    for problem in listed:
        problems.add(f"starter {problem['name']}", problem["name"], problem.get("doc", ""))
