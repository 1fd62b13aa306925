"""Rows of single files: JSON lines, JSON, CSV, TSV, Parquet and plain text."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flora_train.config.errors import first_line, user_error
from flora_train.config.json_format import DuplicateKeyError, parse_json
from flora_train.config.task_schema import SourceConfig

Row = dict[str, Any]


def file_rows(path: Path, source: SourceConfig, key: str) -> Iterator[Row]:
    """The rows of a file, by its ending. Raises UserError, naming `key`, if it cannot be read."""
    try:
        yield from READERS[path.suffix.lower()](path, source)
    except (OSError, ValueError, csv.Error) as error:
        raise user_error(key, str(path), f"cannot be read: {first_line(error)}") from None
    except ImportError:
        raise user_error(
            key, str(path), "needs the pyarrow package: pip install 'flora-train[parquet]'"
        ) from None


def _read_jsonl(path: Path, source: SourceConfig) -> Iterator[Row]:
    # not splitlines: U+2028 and similar characters occur unescaped in JSON text
    for number, line in enumerate(decode(path).split("\n"), start=1):
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
    text = decode(path)
    try:
        content = parse_json(text)
    except DuplicateKeyError as error:
        raise ValueError(f"{_row_with_duplicate_key(text)} {error}") from None
    except ValueError as error:
        raise ValueError(f"it {error}") from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("it must be a JSON list of objects")
    yield from content


def _row_with_duplicate_key(text: str) -> str:
    """The row of a list with a key twice, and its first line."""
    decoder, at, number = json.JSONDecoder(), text.find("[") + 1, 0
    while (begin := text.find("{", at)) >= 0:
        _, at = decoder.raw_decode(text, begin)
        number += 1
        try:
            parse_json(text[begin:at])
        except DuplicateKeyError:
            line = text.count("\n", 0, begin) + 1
            return f"row {number} (line {line})"
    return "it"


def _read_csv(path: Path, source: SourceConfig) -> Iterator[Row]:
    text = decode(path)
    # the csv module's limit of 128 KiB per cell is less than a long source file has
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        rows = list(_table(text, path.suffix.lower() == ".tsv"))
    finally:
        csv.field_size_limit(limit)
    yield from rows


def _table(text: str, tabs: bool) -> Iterator[Row]:
    """Rows by the names of the header; a row may be shorter. Raises ValueError that names the first wrong
    line."""
    lines = io.StringIO(text, newline="")
    # tab-separated corpora (Common Voice) contain bare quotation marks; with commas, an unclosed one would
    # swallow rows
    dialect: dict[str, Any] = {"strict": True}
    if tabs:
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(lines, **dialect)
    header: list[str] | None = None
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            hint = ": a quotation mark is not closed, or stands undoubled in a quoted cell"
            if tabs:
                hint = ""
            raise ValueError(f"line {begin}: {error}{hint}") from None
        if cells is None:
            return
        if header is None:
            if cells:
                header = _checked_header(cells, tabs)
        elif len(cells) > len(header):
            raise ValueError(f"line {begin} has more cells than the header")
        elif cells:
            yield dict(zip_longest(header, cells))


def _checked_header(names: list[str], tabs: bool) -> list[str]:
    if twice := _first_duplicate(names):
        raise ValueError(f"line 1 has the column {twice!r} twice: one of them would be lost; rename one")
    if names.count("") > 1:
        raise ValueError("line 1 has several columns without a name: name them")
    other_delimiters = "," if tabs else ";\t|"
    if len(names) == 1 and any(mark in names[0] for mark in other_delimiters):
        hint = "there must be commas between cells (a file with tabs is named .tsv)"
        if tabs:
            hint = "there must be tabs between cells: name a file with commas .csv"
        raise ValueError(f"line 1 is one column, {names[0]!r}: {hint}")
    return names


def _first_duplicate(names: list[str]) -> str | None:
    """The first name that occurs twice; columns without a name are not compared."""
    seen: set[str] = set()
    for name in names:
        if name in seen and name:
            return name
        seen.add(name)
    return None


def _read_parquet(path: Path, source: SourceConfig) -> Iterator[Row]:
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            twice = _first_duplicate([_name_of(field) for field in file.schema_arrow])
            if twice is not None:
                raise ValueError(f"has the column {twice!r} twice: one of them would be lost")
            rows = file.read().to_pylist()
    except Exception as error:  # a damaged file raises many types, of pyarrow and of Python
        raise ValueError(first_line(error)) from None
    yield from rows


def _name_of(field: Any) -> str:
    """The name of a column. Raises ValueError if a structure in it has a name twice."""
    names = [_name_of(field.type.field(i)) for i in range(getattr(field.type, "num_fields", 0))]
    twice = _first_duplicate(names)
    if twice is not None:
        raise ValueError(f"has {twice!r} twice in column {field.name!r}: one of them would be lost")
    return str(field.name)


def _read_text(path: Path, source: SourceConfig) -> Iterator[Row]:
    text = decode(path)
    if source.sample_by == "line":
        parts = [line.rstrip("\n") for line in io.StringIO(text)]
    elif source.sample_by == "paragraph":
        parts = re.split(r"\n{2,}", text.strip("\n"))
    else:
        parts = [text]
    yield from ({"text": part} for part in parts)


def decode(path: Path) -> str:
    """The text of a file, with \n as line ends. Raises ValueError if it is not UTF-8 text."""
    content = path.read_bytes()
    for mark, encoding in ENCODINGS:
        if content.startswith(mark):
            raise ValueError(f"is not UTF-8 text (byte 0): it is {encoding}")
    try:
        text = content.decode("utf-8-sig")  # with or without the byte order mark
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
"""First bytes of files in other formats, and what to do with them."""


READERS: dict[str, Callable[[Path, SourceConfig], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
