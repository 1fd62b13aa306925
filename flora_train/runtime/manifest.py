"""The manifest of the files that a run writes into its folder. Only those are deleted when the run is replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

PEFT_WARNING = "NOT_FOR_PLAIN_PEFT.txt"
"""Written beside an adapter that plain PEFT does not load; it states the reason."""

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", PEFT_WARNING, "README.md")

RUN_FILES = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "clips_left_out.tsv",
    "checkpoints/step-{n}.safetensors",
    "checkpoints/best/{adapter}.safetensors",
    *(f"adapters/{{adapter}}/{file}" for file in PEFT_FILES),
    "eval/report.json",
    "eval/report.html",
    "eval/heldout/settings.json",
    "eval/heldout/pieces-{n}.jsonl",
    "eval/speech/settings.json",
    "eval/speech/transcripts-{n}.jsonl",
    "eval/speech/error_rates.json",
)
"""What every run may write. {adapter}: one of its adapters; {n}: a number; {part}: any text without a slash; {rest}: any text."""

TOKENS = {"n": r"\d+", "adapter": r"(?P<adapter>[^/]+)", "part": r"[^/]+", "rest": r".+"}
TEMPORARY = re.compile(r"^\.(.+)\.\d+\.tmp$")
"""What a write leaves that was killed: the name of the file or folder is inside."""


def suite_files(suites: Iterable[str]) -> list[str]:
    """What a run writes of suites of programming problems."""
    files = ("settings.json", "completions-{n}.jsonl", "verdicts.jsonl", "scores.json")
    return [f"eval/{suite}/{file}" for suite in suites for file in files]


@dataclass(frozen=True)
class Manifest:
    """names: paths below the run folder, with the placeholders of RUN_FILES; adapters: what {adapter} stands for."""

    names: tuple[str, ...]
    adapters: frozenset[str]

    @classmethod
    def of(cls, adapters: Iterable[str], names: Iterable[str] = RUN_FILES) -> Manifest:
        return cls(tuple(dict.fromkeys(names)), frozenset(adapters))

    @classmethod
    def read(cls, content: Any) -> Manifest | None:
        """The one in run.json; None if there is none, or one that names files outside the folder."""
        if not isinstance(content, Mapping):
            return None
        names, adapters = _texts(content.get("names")), _texts(content.get("adapters"))
        if names is None or adapters is None:
            return None
        if not all(map(_is_below, (*names, *adapters))) or any("/" in name for name in adapters):
            return None
        if any(name.count(token) > 1 for name in names for token in ("{adapter}", "{rest}")):
            return None
        return cls.of(adapters, names)

    def to_json(self) -> dict[str, list[str]]:
        return {"names": list(self.names), "adapters": sorted(self.adapters)}

    def __or__(self, other: Manifest) -> Manifest:
        return Manifest.of(self.adapters | other.adapters, (*self.names, *other.names))

    def files(self, folder: Path) -> list[Path]:
        """The files below `folder` that it names, and what a killed write of one of them left."""
        patterns, found = [_pattern(name) for name in self.names], []
        for place, _, files in os.walk(folder):
            for file in files:
                path = Path(place, file)
                if self._names(patterns, _finished(path.relative_to(folder).as_posix())):
                    found.append(path)
        return sorted(found)

    def links(self, folder: Path) -> list[Path]:
        """Links below `folder` in the place of folders that it needs: what is behind them is not the run's alone."""
        parents = {str(parent) for name in self.names for parent in PurePosixPath(name).parents} - {"."}
        patterns = [_pattern(parent) for parent in sorted(parents)]
        found = [Path(place, name) for place, folders, _ in os.walk(folder) for name in folders]
        links = [path for path in found if path.is_symlink()]
        return [path for path in links if self._names(patterns, path.relative_to(folder).as_posix())]

    def _names(self, patterns: Sequence[re.Pattern[str]], path: str) -> bool:
        for pattern in patterns:
            match = pattern.match(path)
            if match is not None:
                adapter = match.groupdict().get("adapter")
                if adapter is None or adapter in self.adapters:
                    return True
        return False


def delete(files: Sequence[Path], folder: Path, keep: Collection[Path] = ()) -> None:
    """Delete these files below `folder`, and the folders that are empty then. Raises OSError."""
    kept, touched = set(keep), set()
    for file in files:
        if file not in kept:
            file.unlink(missing_ok=True)
            touched.add(file.parent)
    for place in sorted(touched, key=lambda path: len(path.parts), reverse=True):
        while place != folder and place.is_dir() and not any(place.iterdir()):
            place.rmdir()
            place = place.parent


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"\{(n|adapter|part|rest)\}", name)
    return re.compile(
        "".join(TOKENS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts)) + r"\Z"
    )


def _finished(path: str) -> str:
    """The path that a temporary file or folder would have got."""
    return "/".join(match[1] if (match := TEMPORARY.match(part)) else part for part in path.split("/"))


def _texts(value: Any) -> list[str] | None:
    return (
        value if isinstance(value, list) and all(isinstance(item, str) and item for item in value) else None
    )


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name
