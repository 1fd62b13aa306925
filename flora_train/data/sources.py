"""Where do a task's rows come from? Hub data sets, local files and folders of source code, all as plain mappings."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from flora_train.config.errors import choices, first_line, user_error
from flora_train.config.json_format import DuplicateKeyError, parse_json
from flora_train.config.paths import PROJECT_ROOT, find_file
from flora_train.config.task_schema import SourceConfig
from flora_train.data.audio.common_voice import release_file, release_rows
from flora_train.data.globs import files_matching

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
        raise user_error(key, source.hub or source.folder or source.common_voice or source.files, "holds no rows")
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
        _check_file(path, key)
    return paths


def _check_file(path: Path, key: str) -> None:
    if path.is_dir():
        raise user_error(key, str(path), f"is a folder: write {key}.folder={path} and {key}.glob=PATTERN")
    if path.suffix.lower() not in READERS:
        raise user_error(key, str(path), f"unknown kind of file; there are {choices(READERS)}")
    if not path.is_file():
        raise user_error(key, str(path), "is no file that can be read twice (a pipe or a device): give a file with rows")
    if not os.access(path, os.R_OK):
        raise user_error(key, str(path), "may not be read: change its permissions")
    if path.stat().st_size == 0:
        raise user_error(key, str(path), "is empty: give a file with rows")


def _matches(pattern: str, key: str) -> list[Path]:
    """A path as it stands, else as a glob; the working directory's before the project's."""
    try:
        exact = find_file(pattern)
        if exact.exists():
            return [exact]
        for root in (Path(), PROJECT_ROOT):
            if files := files_matching(root / Path(pattern).expanduser()):
                return files
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero in it, an unknown ~user
        raise user_error(key, pattern, f"is no path that can be read: {first_line(error)}") from None
    how = next((f"; build it with: make {target}" for folder, target in BUILT.items() if pattern.startswith(folder)), "")
    raise user_error(key, pattern, f"no such file in {Path.cwd()}{how}")


BUILT = {"assets/code_local/": "code-local", "assets/speech_local/": "speech-local"}
"""Folders that are built once -> what builds them."""


def _files_below(name: str, pattern: str, key: str) -> list[Path]:
    try:
        folder = find_file(name)
        if not folder.is_dir():
            raise user_error(f"{key}.folder", name, f"no such folder in {Path.cwd()}")
    except (OSError, ValueError, RuntimeError) as error:
        raise user_error(f"{key}.folder", name, f"is no path that can be read: {first_line(error)}") from None
    try:
        found = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
        visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    except (NotImplementedError, ValueError, OSError, IndexError, AttributeError) as error:  # pathlib's own, for ./ and its like
        raise user_error(f"{key}.glob", pattern, f"is not a pattern below the folder: {error}") from None
    if not visible:
        raise user_error(f"{key}.glob", pattern, f"matches no file in {name}")
    return visible


def _hub_rows(source: SourceConfig, key: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise user_error(f"{key}.hub", source.hub, "needs the datasets package: pip install 'flora-train[hub]'") from None
    options = {"data_dir": source.data_dir, "split": source.split, "revision": source.revision}
    try:
        # a data set in the local cache loads offline too
        rows = datasets.load_dataset(source.hub, source.subset, streaming=source.max_rows is not None, **options)
        for name, feature in (getattr(rows, "features", None) or {}).items():
            if isinstance(feature, datasets.Audio):  # as bytes: decoding is ours
                rows = rows.cast_column(name, datasets.Audio(decode=False))
        return list(islice(rows, source.max_rows))
    except Exception as error:  # the library raises many kinds; every one means that this source cannot be used
        raise user_error(f"{key}.hub", source.hub, _why_no_hub(source, error)) from error


def _why_no_hub(source: SourceConfig, error: Exception) -> str:
    instead = f" Instead of it: {source.fallback_hint}" if source.fallback_hint else " Instead of it: files or a folder"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return f"is not in the local cache, and HF_HUB_OFFLINE says there is no hub: unset it.{instead}"
    said = f"{type(error).__name__}: {error}"
    if any(word in said.lower() for word in ("gated", "401", "403", "restricted", "authenticated")):
        page = f"https://huggingface.co/datasets/{source.hub}"
        return f"is gated: accept its terms on {page}, then run `hf auth login`.{instead}"
    return f"cannot be loaded ({type(error).__name__}: {first_line(error)}).{instead}"


def _folder_rows(source: SourceConfig, key: str) -> list[Row]:
    paths, rows = source_files(source, key), []
    root = find_file(str(source.folder))
    for path in paths:
        try:
            rows.append({"text": _decode(path), "path": path.relative_to(root).as_posix()})
        except (OSError, ValueError) as error:
            raise user_error(key, str(path), f"{first_line(error)}: narrow {key}.glob") from None
    return rows


def _file_rows(path: Path, source: SourceConfig, key: str) -> Iterator[Row]:
    try:
        yield from READERS[path.suffix.lower()](path, source)
    except (OSError, ValueError, csv.Error) as error:
        raise user_error(key, str(path), f"cannot be read: {first_line(error)}") from None
    except ImportError:
        raise user_error(key, str(path), "needs the pyarrow package: pip install 'flora-train[parquet]'") from None


def _read_jsonl(path: Path, source: SourceConfig) -> Iterator[Row]:
    # not splitlines: U+2028 and its like stand unescaped inside JSON text
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number} {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} must be a JSON object with columns")
        yield row


def _read_json(path: Path, source: SourceConfig) -> Iterator[Row]:
    text = _decode(path)
    try:
        content = parse_json(text)
    except DuplicateKeyError as error:
        raise ValueError(f"{_place_of_doubled_key(text)} {error}") from None
    except ValueError as error:
        raise ValueError(f"it {error}") from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("it must be a JSON list of objects")
    yield from content


def _place_of_doubled_key(text: str) -> str:
    """Which row of a list it is in, and on which line that begins."""
    decoder, at, number = json.JSONDecoder(), text.find("[") + 1, 0
    while (begin := text.find("{", at)) >= 0:
        _, at = decoder.raw_decode(text, begin)
        number += 1
        try:
            parse_json(text[begin:at])
        except DuplicateKeyError:
            return f"row {number} (line {text.count(chr(10), 0, begin) + 1})"
    return "it"


def _read_csv(path: Path, source: SourceConfig) -> Iterator[Row]:
    text = _decode(path)
    # The module's limit of 128 KiB a cell is shorter than a long source file.
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        rows = list(_table(text, path.suffix.lower() == ".tsv"))
    finally:
        csv.field_size_limit(limit)
    yield from rows


def _table(text: str, tabs: bool) -> Iterator[Row]:
    """Rows by the header's names; a row may be shorter. Raises ValueError naming the line of what cannot be a table."""
    lines = io.StringIO(text, newline="")
    # tab-separated corpora (Common Voice) hold bare quotation marks; with commas, one that is not closed would swallow rows
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(lines, **how)
    header: list[str] | None = None
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            quote = "a quotation mark is opened on it and not closed, or stands inside a quoted cell without being doubled"
            raise ValueError(f"line {begin}: {error}: {quote}" if not tabs else f"line {begin}: {error}") from None
        if cells is None:
            return
        if header is None:
            header = _checked_header(cells, tabs) if cells else None
        elif len(cells) > len(header):
            raise ValueError(f"line {begin} has more cells than the header")
        elif cells:
            yield dict(zip_longest(header, cells))


def _checked_header(names: list[str], tabs: bool) -> list[str]:
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"line 1 has the column {twice!r} twice: one of them would be lost; rename one")
    if names.count("") > 1:
        raise ValueError("line 1 has several columns without a name: name them")
    other = "," if tabs else next((mark for mark in ";\t|" if mark in names[0]), None)
    if len(names) == 1 and other is not None and other in names[0]:
        wanted = (
            "tabs between cells: name a file with commas .csv"
            if tabs
            else "commas between cells (a file with tabs is named .tsv)"
        )
        raise ValueError(f"line 1 is one column, {names[0]!r}: there must be {wanted}")
    return names


def _read_parquet(path: Path, source: SourceConfig) -> Iterator[Row]:
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = [_name_of(field) for field in file.schema_arrow]
            for twice in (name for i, name in enumerate(names) if name in names[:i]):
                raise ValueError(f"has the column {twice!r} twice: one of them would be lost")
            rows = file.read().to_pylist()
    except Exception as error:  # a damaged file raises many kinds, of pyarrow and of Python
        raise ValueError(first_line(error)) from None
    yield from rows


def _name_of(field: Any) -> str:
    """A column's name. Raises ValueError where a structure in it has a name twice."""
    inner = [field.type.field(i) for i in range(field.type.num_fields)] if hasattr(field.type, "num_fields") else []
    names = [_name_of(one) for one in inner]
    for twice in (name for i, name in enumerate(names) if name in names[:i]):
        raise ValueError(f"has {twice!r} twice in column {field.name!r}: one of them would be lost")
    return str(field.name)


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
    """The text of a file of ours or others. Raises ValueError for what is no UTF-8 text."""
    content = path.read_bytes()
    for mark, name in ENCODINGS:
        if content.startswith(mark):
            raise ValueError(f"is not UTF-8 text (byte 0): it is {name}")
    try:
        text = content.decode("utf-8-sig")  # with or without the mark that Windows puts first
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None
    if (at := text.find("\0")) >= 0:
        raise ValueError(f"is not text: character {at} is a zero, as in binary files and in UTF-16")
    return text.replace("\r\n", "\n").replace("\r", "\n")


ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32: save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16: save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16: save it as UTF-8"),
    (b"\x1f\x8b", "compressed (gzip): unpack it"),
    (b"PK\x03\x04", "compressed (zip): unpack it"),
)
"""How a file begins that is something else, and what that is."""


READERS: dict[str, Callable[[Path, SourceConfig], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
