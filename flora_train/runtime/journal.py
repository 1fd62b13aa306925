"""Journals: jsonl files that only grow, so that a kill loses no finished work. A last line without its end is
dropped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, get_origin, get_type_hints

from flora_train.config.errors import Problem, UserError, user_error
from flora_train.config.json_format import JsonValue, parse_object, read_object
from flora_train.runtime.atomic import disk_errors, write_atomically

CHECKSUM = "check"
"""The key of a line's checksum. A line without one is accepted: other programs may have written it."""
NOT_IN_CHECKSUM = ("adapter_sha", "prompt_sha", "clip_sha")
"""These are compared with the adapters, prompts and clips themselves."""


def append_line(file: Path, line: str) -> None:
    """Append a line. Raises UserError if the disk is full; then the file holds what it held before."""
    size = file.stat().st_size if file.exists() else 0
    try:
        with disk_errors(file), file.open("a", encoding="utf-8") as out:
            out.write(f"{line}\n")
    except UserError:
        with suppress(OSError):
            os.truncate(file, size)
        raise


def whole_lines(content: bytes) -> bytes:
    """The content up to its last line end: what follows was cut short by a kill or a full disk."""
    return content[: content.rfind(b"\n") + 1]


class Logged(Protocol):
    """A dataclass whose `key` identifies the piece of work that it is the result of."""

    @property
    def key(self) -> tuple[Hashable, ...]: ...


Entry = TypeVar("Entry", bound=Logged)


class Journal(Generic[Entry]):
    """A folder with settings.json, and with a file <word>s-<process>.jsonl of each process."""

    def __init__(self, path: Path, kind: type[Entry], word: str, remedy: str) -> None:
        self.path = path
        self.kind = kind
        """Type of the entries."""
        self.word = word
        """Name of an entry in messages."""
        self.remedy = remedy
        """Remedy for entries of another kind, in messages."""
        self.settings = path / "settings.json"

    def claim(self, settings: Mapping[str, JsonValue], restart: bool = False) -> None:
        """Reserve the folder for entries made with these settings.

        restart: delete entries made with other settings. Without it they raise UserError, which names every
        setting that differs, as they would be mixed.
        """
        if restart and self.has_other_settings(settings):
            self.delete()
        if self._has_entries() and not self.settings.exists():
            hint = (
                f"holds {self.word}s, and no settings.json with the settings that they were made with: "
                f"{self.remedy}"
            )
            raise user_error(str(self.path), None, hint)
        if self._has_entries():
            recorded = read_object(self.settings, self.remedy)
            self._compare(recorded, settings, {**recorded, **settings})
            return
        self._check_replaceable(settings)
        text = json.dumps(settings, indent=2) + "\n"
        write_atomically(self.settings, lambda path: path.write_text(text, encoding="utf-8"))

    def check(self, settings: Mapping[str, JsonValue]) -> None:
        """Compare these settings with the recorded ones, before the others are known. Changes nothing. Raises
        UserError as `claim` does."""
        if self.settings.exists() and self._has_entries():
            self._compare(read_object(self.settings, self.remedy), settings, settings)

    def has_other_settings(self, settings: Mapping[str, JsonValue], partial: bool = False) -> bool:
        """Whether the folder has entries that were made with other settings. partial: compare only these
        keys."""
        if not self.settings.exists() or not self._has_entries():
            return False
        recorded = read_object(self.settings, self.remedy)
        keys = settings.keys() if partial else settings.keys() | recorded.keys()
        return any(recorded.get(key) != settings.get(key) for key in keys)

    def read(self) -> dict[tuple[Any, ...], Entry]:
        """All entries by key. Raises UserError for a line that is damaged or not an entry."""
        entries: dict[tuple[Any, ...], Entry] = {}
        for file in self._files():
            for number, line in enumerate(_read_lines(file).split(b"\n")[:-1], 1):
                entry = self._parse(f"{file}:{number}", line)
                if entry.key in entries:
                    key = "/".join(map(str, entry.key))
                    raise user_error(f"{file}:{number}", key, f"occurs twice: {self.remedy}")
                entries[entry.key] = entry
        return entries

    def writer(self, rank: int) -> JournalWriter:
        """The writer of one process."""
        return JournalWriter(self.path / f"{self.word}s-{rank}.jsonl")

    def delete(self) -> None:
        """Delete the journal's files, and the folder if nothing else is in it."""
        for file in (*self._files(), self.settings):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def _parse(self, location: str, line: bytes) -> Entry:
        try:
            return _entry(self.kind, line)
        except (ValueError, TypeError, RecursionError) as error:
            article = "an" if self.word[0] in "aeiou" else "a"
            hint = (
                f"is damaged, or not {article} {self.word}: delete this line to have it computed again; or "
                f"{self.remedy}"
            )
            raise user_error(location, None, hint) from error

    def _compare(
        self, recorded: Mapping[str, JsonValue], settings: Mapping[str, JsonValue], keys: Iterable[str]
    ) -> None:
        problems = []
        for key in keys:
            if recorded.get(key) != settings.get(key):
                hint = (
                    f"its {self.word}s were made with {recorded.get(key)!r} and would be mixed: {self.remedy}"
                )
                problems.append(Problem(f"{self.path}: {key}", settings.get(key), hint))
        if problems:
            raise UserError(*problems)

    def _check_replaceable(self, settings: Mapping[str, JsonValue]) -> None:
        """Raises UserError if the folder has a settings.json of something else."""
        if not self.settings.exists():
            return
        try:
            recorded = json.loads(self.settings.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            recorded = None
        if not isinstance(recorded, dict) or recorded.keys() != settings.keys():
            raise user_error(
                str(self.settings),
                None,
                f"was not written by flora_train and would be overwritten: {self.remedy}",
            )

    def _has_entries(self) -> bool:
        return any(_read_lines(file) for file in self._files())

    def _files(self) -> list[Path]:
        files = self.path.glob(f"{self.word}s-*.jsonl")
        return sorted(file for file in files if re.fullmatch(r".*-\d+", file.stem))


class JournalWriter:
    """Appends entries to one file. Each is handed to the system before the next."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                os.truncate(file, len(_read_lines(file)))

    def append(self, entry: Any) -> None:
        """Raises UserError if the disk is full; then the file holds what it held before."""
        content = asdict(entry)
        append_line(self.file, json.dumps({**content, CHECKSUM: _checksum(content)}, ensure_ascii=False))


def _entry(kind: type[Entry], line: bytes) -> Entry:
    content = parse_object(line)
    checksum = content.pop(CHECKSUM, None)
    if checksum is not None and checksum != _checksum(content):
        raise ValueError("its checksum does not match")
    for key, hint in _hints(kind).items():
        if not _fits(content.get(key), hint):
            raise TypeError(f"{key} is not of type {hint}")
    return kind(**content)


_hints = cache(get_type_hints)


def _checksum(content: Mapping[str, JsonValue]) -> str:
    covered = {key: value for key, value in content.items() if key not in NOT_IN_CHECKSUM}
    return sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:16]


def _read_lines(file: Path) -> bytes:
    if file.exists() and not file.is_file():
        raise user_error(str(file), None, "is not a file: move it away")
    try:
        return whole_lines(file.read_bytes())
    except OSError as error:
        raise user_error(str(file), None, f"cannot be read ({error.strerror})") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value can be one of a field with this type hint, as far as plain types go."""
    if hint is float:
        return type(value) in (int, float)
    if hint in (str, int, bool):
        return type(value) is hint
    if get_origin(hint) in (list, tuple):
        return isinstance(value, list)
    return True
