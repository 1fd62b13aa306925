"""Where do a task's rows come from? Hub data sets, local files and folders of source code, all as plain mappings."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from flora_train.config.errors import choices, fail, first_line
from flora_train.config.files import PROJECT_ROOT, at_home, find_file
from flora_train.config.task_schema import SourceConfig
from flora_train.data.audio.common_voice import release_file, release_rows

Row = dict[str, Any]


def read_rows(source: SourceConfig, key: str) -> list[Row]:
    """All rows of a source. `key` is its configuration key, for errors.

    Raises UserError if a file is missing, empty, of unknown kind or unreadable, or the hub cannot be reached.
    """
    if source.hub is not None:
        rows = _hub_rows(source, key)
    elif source.folder is not None:
        rows = _folder_rows(source, key)
    elif source.common_voice is not None:
        rows = release_rows(source, key, lambda table: list(_file_rows(table, source, key)))
    else:
        rows = [row for path in source_files(source, key) for row in _file_rows(path, source, key)]
    if not rows:
        raise fail(key, source.hub or source.folder or source.common_voice or source.files, "holds no rows")
    return rows


def source_files(source: SourceConfig, key: str) -> list[Path]:
    """The local files of a source, sorted; empty for the hub. Raises UserError if there are none."""
    if source.hub is not None:
        return []
    if source.folder is not None:
        return _files_below(source.folder, source.glob, key)
    if source.common_voice is not None:
        return [release_file(source, key)]
    paths = list(dict.fromkeys(path for pattern in source.files or () for path in _matches(pattern, key)))
    for path in paths:
        if path.is_dir():
            raise fail(key, str(path), f"is a folder: write {key}.folder={path} and {key}.glob=PATTERN")
        if path.suffix.lower() not in READERS:
            raise fail(key, str(path), f"unknown kind of file; there are {choices(READERS)}")
        if path.stat().st_size == 0:
            raise fail(key, str(path), "is empty: give a file with rows")
    return paths


def _matches(pattern: str, key: str) -> list[Path]:
    """A path as it stands, else as a glob; the working directory's before the project's."""
    exact = find_file(pattern)
    if exact.exists():
        return [exact]
    for root in (Path(), PROJECT_ROOT):
        hits = sorted(glob.glob(str(root / at_home(pattern)), recursive=True))
        if files := [Path(hit) for hit in hits if Path(hit).is_file()]:
            return files
    how = next((f"; build it with: make {target}" for folder, target in BUILT.items() if pattern.startswith(folder)), "")
    raise fail(key, pattern, f"no such file in {Path.cwd()}{how}")


BUILT = {"assets/code_local/": "code-local", "assets/speech_local/": "speech-local"}
"""Folders that are built once -> what builds them."""


def _files_below(name: str, pattern: str, key: str) -> list[Path]:
    folder = find_file(name)
    if not folder.is_dir():
        raise fail(f"{key}.folder", name, f"no such folder in {Path.cwd()}")
    try:
        found = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    except (NotImplementedError, ValueError) as error:
        raise fail(f"{key}.glob", pattern, f"is not a pattern below the folder: {error}") from None
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not visible:
        raise fail(f"{key}.glob", pattern, f"matches no file in {name}")
    return visible


def _hub_rows(source: SourceConfig, key: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise fail(f"{key}.hub", source.hub, "needs the datasets package: pip install 'flora-train[hub]'") from None
    options = {"data_dir": source.data_dir, "split": source.split, "revision": source.revision}
    try:
        # a data set in the local cache loads offline too
        rows = datasets.load_dataset(source.hub, source.subset, streaming=source.max_rows is not None, **options)
        for name, feature in (getattr(rows, "features", None) or {}).items():
            if isinstance(feature, datasets.Audio):  # as bytes: decoding is ours
                rows = rows.cast_column(name, datasets.Audio(decode=False))
        return list(islice(rows, source.max_rows))
    except Exception as error:  # the library raises many kinds; every one means that this source cannot be used
        raise fail(f"{key}.hub", source.hub, _why_no_hub(source, error)) from error


def _why_no_hub(source: SourceConfig, error: Exception) -> str:
    instead = f" Instead of it: {source.stand_in}" if source.stand_in else " Instead of it: files or a folder"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return f"is not in the local cache, and HF_HUB_OFFLINE says there is no hub: unset it.{instead}"
    said = f"{type(error).__name__}: {error}"
    if any(word in said.lower() for word in ("gated", "401", "403", "restricted", "authenticated")):
        page = f"https://huggingface.co/datasets/{source.hub}"
        return f"is gated: accept its terms on {page}, then run `hf auth login`.{instead}"
    return f"cannot be loaded ({type(error).__name__}: {first_line(error)}).{instead}"


def _folder_rows(source: SourceConfig, key: str) -> list[Row]:
    root = find_file(str(source.folder))
    rows = []
    for path in source_files(source, key):
        try:
            rows.append({"text": _decode(path), "path": path.relative_to(root).as_posix()})
        except (OSError, ValueError) as error:
            raise fail(key, str(path), f"{first_line(error)}: narrow {key}.glob") from None
    return rows


def _file_rows(path: Path, source: SourceConfig, key: str) -> Iterator[Row]:
    try:
        yield from READERS[path.suffix.lower()](path, source)
    except (OSError, ValueError, csv.Error) as error:
        raise fail(key, str(path), f"cannot be read: {first_line(error)}") from None
    except ImportError:
        raise fail(key, str(path), "needs the pyarrow package: pip install 'flora-train[parquet]'") from None


def _read_jsonl(path: Path, source: SourceConfig) -> Iterator[Row]:
    # not splitlines: U+2028 and its like stand unescaped inside JSON text
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error.msg} (column {error.colno})") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} must be a JSON object with columns")
        yield row


def _read_json(path: Path, source: SourceConfig) -> Iterator[Row]:
    content = json.loads(_decode(path))
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("it must be a JSON list of objects")
    yield from content


def _read_csv(path: Path, source: SourceConfig) -> Iterator[Row]:
    text = _decode(path)
    # The module's limit of 128 KiB a cell is shorter than a long source file.
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        lines, rows = io.StringIO(text, newline=""), []
        if path.suffix.lower() == ".tsv":  # tab-separated corpora (Common Voice) hold bare quotation marks
            reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.DictReader(lines)
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than the header")
            rows.append(row)
    finally:
        csv.field_size_limit(limit)
    yield from rows


def _read_parquet(path: Path, source: SourceConfig) -> Iterator[Row]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        yield from parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(first_line(error)) from None


def _read_text(path: Path, source: SourceConfig) -> Iterator[Row]:
    text = _decode(path)
    if source.sample_by == "line":
        parts = [line.rstrip("\n") for line in io.StringIO(text)]
    elif source.sample_by == "paragraph":
        parts = re.split(r"\n{2,}", text.strip("\n"))
    else:
        parts = [text]
    yield from ({"text": part} for part in parts)


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows puts first
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None


READERS: dict[str, Callable[[Path, SourceConfig], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
