"""Rows of a task's source: hub data sets, local files, folders of source code and Common Voice releases."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from flora_train.config.errors import choices, first_line, user_error
from flora_train.config.paths import PROJECT_ROOT, find_file
from flora_train.config.task_schema import SourceConfig
from flora_train.data.audio.common_voice import check_release, release_file, release_rows
from flora_train.data.documents import LocatedRow
from flora_train.data.file_rows import READERS, Row, file_rows
from flora_train.data.globs import files_matching
from flora_train.data.hub_rows import hub_rows
from flora_train.data.text_files import decode

BUILT = {
    "assets/code_local/": "make code-local",
    "assets/speech_local/": "make speech-local",
    "assets/clinical_local/": "python assets/build_clinical_corpus.py",
    "assets/udhr_local/": "python assets/build_many_languages.py",
    "assets/routed_local/": "python assets/build_routed_mixture.py",
}
"""Folders that are built once -> the command that builds them."""


def read_rows(source: SourceConfig, key: str) -> list[Row]:
    """All rows of a source that is small, as column -> value. Raises UserError as `located_rows` does."""
    return [row.cells for row in located_rows(source, key)]


def located_rows(source: SourceConfig, key: str) -> Iterator[LocatedRow]:
    """The rows of a source with their places in the files, one after the other. key: its configuration key,
    for errors.

    Raises UserError if a file is missing, empty, unreadable or of an unknown type, or the hub cannot be
    reached.
    """
    empty = True
    for row in _located(source, key):
        empty = False
        yield row
    if empty:
        name = source.hub or source.folder or source.common_voice
        raise user_error(key, name or source.files, "holds no rows")


class SourceRows(Iterable[LocatedRow]):
    """The rows of a source, which is read at every iteration. key: its configuration key."""

    def __init__(self, source: SourceConfig, key: str) -> None:
        self.source, self.key = source, key

    def __iter__(self) -> Iterator[LocatedRow]:
        return located_rows(self.source, self.key)


def _located(source: SourceConfig, key: str) -> Iterator[LocatedRow]:
    if source.hub is not None:
        yield from _numbered(hub_rows(source, key), source.hub)
    elif source.folder is not None:
        yield from _folder_rows(source, key)
    elif source.common_voice is not None:
        yield from _numbered(release_rows(source, key), source.common_voice)
    else:
        for path in source_files(source, key):
            for number, row in file_rows(path, source, key):
                yield LocatedRow(row, str(path), number)


def _numbered(rows: Iterable[Row], file: str) -> Iterator[LocatedRow]:
    for number, row in enumerate(rows, start=1):
        yield LocatedRow(row, file, number)


def source_files(source: SourceConfig, key: str) -> list[Path]:
    """The local files of a source, sorted; empty for the hub. Raises UserError if there are none."""
    if source.hub is not None:
        return []
    if source.folder is not None:
        return _files_below(source.folder, source.glob, key)
    if source.common_voice is not None:
        return [release_file(source, key)]
    paths: dict[Path, None] = {}
    for pattern in source.files or ():
        paths |= dict.fromkeys(_matches(pattern, key))
    for path in paths:
        _check_file(path, key)
    return list(paths)


def check_present(source: SourceConfig, key: str) -> None:
    """Raises UserError if a local source is missing. Reads no rows, and unpacks no archive."""
    if source.common_voice is not None:
        check_release(source, key)
    elif source.folder is not None:
        _existing_folder(source.folder, key)
    else:
        source_files(source, key)


def _check_file(path: Path, key: str) -> None:
    if path.is_dir():
        raise user_error(key, str(path), f"is a folder: write {key}.folder={path} and {key}.glob=PATTERN")
    if path.suffix.lower() not in READERS:
        raise user_error(key, str(path), f"is of an unknown type; known types are {choices(READERS)}")
    if not path.is_file():
        raise user_error(key, str(path), "is not a regular file (a pipe or a device): give a file with rows")
    if not os.access(path, os.R_OK):
        raise user_error(key, str(path), "is not readable: change its permissions")
    if path.stat().st_size == 0:
        raise user_error(key, str(path), "is empty: give a file with rows")


def _matches(pattern: str, key: str) -> list[Path]:
    """The files of a path, or else of a glob, in the working directory or else in the project."""
    try:
        exact = find_file(pattern)
        if exact.exists():
            return [exact]
        for root in (Path(), PROJECT_ROOT):
            if files := files_matching(root / Path(pattern).expanduser()):
                return files
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero in it, an unknown ~user
        raise user_error(key, pattern, f"is not a readable path: {first_line(error)}") from None
    hint = f"no such file in {Path.cwd()}"
    for folder, command in BUILT.items():
        if pattern.startswith(folder):
            hint += f"; build it with: {command}"
    raise user_error(key, pattern, hint)


def _existing_folder(name: str, key: str) -> Path:
    try:
        folder = find_file(name)
        if not folder.is_dir():
            raise user_error(f"{key}.folder", name, f"no such folder in {Path.cwd()}")
    except (OSError, ValueError, RuntimeError) as error:
        raise user_error(f"{key}.folder", name, f"is not a readable path: {first_line(error)}") from None
    return folder


def _files_below(name: str, pattern: str, key: str) -> list[Path]:
    folder = _existing_folder(name, key)
    try:
        files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
        visible = [path for path in files if not _is_hidden(path.relative_to(folder))]
    except (
        NotImplementedError,
        ValueError,
        OSError,
        IndexError,
        AttributeError,
    ) as error:  # raised by pathlib for patterns such as ./
        raise user_error(f"{key}.glob", pattern, f"is not a pattern below the folder: {error}") from None
    if not visible:
        raise user_error(f"{key}.glob", pattern, f"matches no file in {name}")
    return visible


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _folder_rows(source: SourceConfig, key: str) -> Iterator[LocatedRow]:
    root = find_file(str(source.folder))
    for path in source_files(source, key):
        try:
            row = {"text": decode(path), "path": path.relative_to(root).as_posix()}
        except (OSError, ValueError) as error:
            raise user_error(key, str(path), f"{first_line(error)}: narrow {key}.glob") from None
        yield LocatedRow(row, str(path), 1)
