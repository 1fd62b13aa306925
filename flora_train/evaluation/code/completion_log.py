"""Where do a run's completions stand? In jsonl files that only grow, one a process, beside the settings that made them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flora_train.config.errors import Problem as Fault
from flora_train.config.errors import UserError, fail
from flora_train.training.atomic import disk_errors, write_atomically

Key = tuple[str, str, str, int]
ANOTHER = "choose another folder (flora-train solve RUN out=FOLDER), or move this one away"


@dataclass(frozen=True)
class LoggedCompletion:
    """One sample as it was generated. prompt_sha: of the whole problem; adapter_sha: of the adapter's numbers ("" the base);
    ended: stop, end or length; tokens: that were computed."""

    adapter: str
    language: str
    name: str
    sample: int
    completion: str
    ended: str
    tokens: int
    prompt_sha: str
    adapter_sha: str

    @property
    def key(self) -> Key:
        return self.adapter, self.language, self.name, self.sample


class CompletionLog:
    """The folder `path`: settings.json and completions-<process>.jsonl, which `flora-train execute` reads, too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.verdicts = path / "verdicts.jsonl"

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder that of completions made with these settings. Raises UserError, naming every setting that differs, if
        it holds those of others: they would be mixed."""
        if self.settings.exists() and any(_whole(file) for file in self._files()):
            try:
                there = json.loads(self.settings.read_text(encoding="utf-8"))
            except ValueError as error:
                raise fail(str(self.settings), None, f"is damaged: {ANOTHER}") from error
            differing = [key for key in {**there, **settings} if there.get(key) != settings.get(key)]
            if differing:
                raise UserError(*(self._mixed(key, there.get(key), settings.get(key)) for key in differing))
        elif any(_whole(file) for file in self._files()):
            raise fail(str(self.path), None, f"holds completions, and no settings.json that says how they were made: {ANOTHER}")
        else:
            text = json.dumps(settings, indent=2) + "\n"
            write_atomically(self.settings, lambda path: path.write_text(text, encoding="utf-8"))

    def read(self) -> dict[Key, LoggedCompletion]:
        """All completions. A last line that a kill or a full disk cut short is no completion; the next writer removes it."""
        found: dict[Key, LoggedCompletion] = {}
        for file in self._files():
            for number, line in enumerate(_whole(file).decode("utf-8").split("\n")[:-1], 1):
                try:
                    logged = LoggedCompletion(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise fail(f"{file}:{number}", None, f"is no completion of ours: {ANOTHER}") from error
                if logged.key in found:
                    raise fail(f"{file}:{number}", "/".join(map(str, logged.key)), f"stands twice: {ANOTHER}")
                found[logged.key] = logged
        return found

    def writer(self, rank: int) -> CompletionWriter:
        """For one process."""
        return CompletionWriter(self.path / f"completions-{rank}.jsonl")

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("completions-*.jsonl"))

    def _mixed(self, key: str, there: Any, ours: Any) -> Fault:
        return Fault(f"{self.path}: {key}", ours, f"its completions were made with {there!r} and would be mixed: {ANOTHER}")


class CompletionWriter:
    """Appends completions to one file; each is on its way to the disk before the next."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                os.truncate(file, len(_whole(file)))

    def append(self, logged: LoggedCompletion) -> None:
        """Raises UserError if the disk is full; the file then holds what it held."""
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with disk_errors(self.file), self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(asdict(logged), ensure_ascii=False) + "\n")
        except UserError:
            with suppress(OSError):
                os.truncate(self.file, size)
            raise


def _whole(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: content.rfind(b"\n") + 1]
