"""Where does work stand that a kill must not lose? In jsonl files that only grow, one a process, beside the settings that made them."""

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

from flora_train.config.errors import Problem as Fault
from flora_train.config.errors import UserError, user_error
from flora_train.config.json_format import parse_object, read_object
from flora_train.runtime.atomic import disk_errors, write_atomically


class Logged(Protocol):
    """A dataclass whose `key` says which piece of work it is the result of."""

    @property
    def key(self) -> tuple[Hashable, ...]: ...


Entry = TypeVar("Entry", bound=Logged)


class Journal(Generic[Entry]):
    """The folder `path`: settings.json and <word>s-<process>.jsonl. kind: of an entry; word: what one is called; another: what to do
    about entries that would be mixed."""

    def __init__(self, path: Path, kind: type[Entry], word: str, another: str) -> None:
        self.path, self.kind, self.word, self.another = path, kind, word, another
        self.settings = path / "settings.json"

    def claim(self, settings: Mapping[str, Any], restart: bool = False) -> None:
        """Reserve the folder for entries made with these settings.

        restart: delete entries made with other settings. Without it they raise UserError, which names every setting
        that differs, as they would be mixed.
        """
        if restart and self.has_other_settings(settings):
            self.forget()
        if self.settings.exists() and any(_whole(file) for file in self._files()):
            there = read_object(self.settings, self.another)
            self._compare(there, settings, {**there, **settings})
        elif any(_whole(file) for file in self._files()):
            words = f"holds {self.word}s, and no settings.json that says how they were made: {self.another}"
            raise user_error(str(self.path), None, words)
        else:
            self._check_ours(settings)
            text = json.dumps(settings, indent=2) + "\n"
            write_atomically(self.settings, lambda path: path.write_text(text, encoding="utf-8"))

    def check(self, settings: Mapping[str, Any]) -> None:
        """As far as these settings go, before the others are known. Changes nothing. Raises UserError as `claim` does."""
        if self.settings.exists() and any(_whole(file) for file in self._files()):
            self._compare(read_object(self.settings, self.another), settings, settings)

    def has_other_settings(self, settings: Mapping[str, Any], partial: bool = False) -> bool:
        """Whether the folder has entries that were made with other settings. partial: compare only these keys."""
        if not self.settings.exists() or not any(_whole(file) for file in self._files()):
            return False
        recorded = read_object(self.settings, self.another)
        keys = settings.keys() if partial else settings.keys() | recorded.keys()
        return any(recorded.get(key) != settings.get(key) for key in keys)

    def _compare(self, there: Mapping[str, Any], settings: Mapping[str, Any], keys: Iterable[str]) -> None:
        if differing := [key for key in keys if there.get(key) != settings.get(key)]:
            raise UserError(*(self._mixed(key, there.get(key), settings.get(key)) for key in differing))

    def _check_ours(self, settings: Mapping[str, Any]) -> None:
        """Raises UserError if a settings.json is there that is of something else."""
        if not self.settings.exists():
            return
        try:
            there = json.loads(self.settings.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            there = None
        if not isinstance(there, dict) or there.keys() != settings.keys():
            raise user_error(
                str(self.settings), None, f"is not ours and would be overwritten: {self.another}"
            )

    def forget(self) -> None:
        """Delete the log: its own files, and the folder if nothing else is in it."""
        for file in (*self._files(), self.settings):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def read(self) -> dict[tuple[Any, ...], Entry]:
        """All entries by key. A last line that a kill or a full disk cut short is none; the next writer removes it."""
        found: dict[tuple[Any, ...], Entry] = {}
        for file in self._files():
            for number, line in enumerate(_whole(file).split(b"\n")[:-1], 1):
                try:
                    logged = _entry(self.kind, line)
                except (ValueError, TypeError, RecursionError) as error:
                    words = f"is no {self.word} of ours, or damaged: delete this line, and it is made again; or {self.another}"
                    raise user_error(f"{file}:{number}", None, words) from error
                if logged.key in found:
                    raise user_error(
                        f"{file}:{number}", "/".join(map(str, logged.key)), f"stands twice: {self.another}"
                    )
                found[logged.key] = logged
        return found

    def writer(self, rank: int) -> LogWriter:
        """For one process."""
        return LogWriter(self.path / f"{self.word}s-{rank}.jsonl")

    def _files(self) -> list[Path]:
        return sorted(
            file for file in self.path.glob(f"{self.word}s-*.jsonl") if re.fullmatch(r".*-\d+", file.stem)
        )

    def _mixed(self, key: str, there: Any, ours: Any) -> Fault:
        return Fault(
            f"{self.path}: {key}",
            ours,
            f"its {self.word}s were made with {there!r} and would be mixed: {self.another}",
        )


class LogWriter:
    """Appends entries to one file; each is on its way to the disk before the next."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                os.truncate(file, len(_whole(file)))

    def append(self, logged: Any) -> None:
        """Raises UserError if the disk is full; the file then holds what it held."""
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with disk_errors(self.file), self.file.open("a", encoding="utf-8") as out:
                out.write(
                    json.dumps({**(entry := asdict(logged)), CHECK: _checksum(entry)}, ensure_ascii=False)
                    + "\n"
                )
        except UserError:
            with suppress(OSError):
                os.truncate(self.file, size)
            raise


CHECK = "check"
"""The key of a line's checksum. A line without one is taken as it is: somebody else may have written it."""
COMPARED = ("adapter_sha", "prompt_sha", "clip_sha")
"""Not in the checksum: they are compared with what they are of."""


def _entry(kind: type[Entry], line: bytes) -> Entry:
    content = parse_object(line)
    check = content.pop(CHECK, None)
    if check is not None and check != _checksum(content):
        raise ValueError("its checksum is another one")
    for key, hint in _hints(kind).items():
        if not _fits(content.get(key), hint):
            raise TypeError(f"{key} is no {hint}")
    return kind(**content)


_hints = cache(get_type_hints)


def _checksum(content: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in content.items() if key not in COMPARED}
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _whole(file: Path) -> bytes:
    if file.exists() and not file.is_file():
        raise user_error(str(file), None, "is no file: move it away")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise user_error(str(file), None, f"cannot be read ({error.strerror})") from error
    return content[: content.rfind(b"\n") + 1]


def _fits(value: Any, kind: Any) -> bool:
    """Whether JSON's value is one of a field of this type, as far as plain types go."""
    if kind is float:
        return type(value) in (int, float)
    if kind in (str, int, bool):
        return type(value) is kind
    if get_origin(kind) in (list, tuple):
        return isinstance(value, list)
    return True
