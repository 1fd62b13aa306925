"""Rows of single files: JSON lines, JSON, CSV, TSV, Parquet and plain text."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flora_train.config.errors import first_line, user_error
from flora_train.config.json_format import DuplicateKeyError, parse_json
from flora_train.config.task_schema import SourceConfig
from flora_train.data.text_files import decode, lines_of, paragraphs_of, text_chunks

Row = dict[str, Any]
NumberedRows = Iterator[tuple[int, Row]]

PARQUET_BUFFER = 1 << 20
"""Bytes of a column that are read at once from a parquet file."""
BATCH_ROWS, BATCH_BYTES = 1024, 1 << 24
"""Rows, and about how many bytes, of a parquet file that are decoded at once."""


def file_rows(path: Path, source: SourceConfig, key: str) -> Iterator[tuple[int, Row]]:
    """(number, row) of a file, by its ending, one after the other: only a .json file is read as a whole. The
    number is that of the line in files of JSON lines. Raises UserError, naming `key`, if it cannot be read.
    """
    try:
        yield from READERS[path.suffix.lower()](path, source)
    except (OSError, ValueError, csv.Error) as error:
        raise user_error(key, str(path), f"cannot be read: {first_line(error)}") from None
    except ImportError:
        raise user_error(
            key, str(path), "needs the pyarrow package: pip install 'flora-train[parquet]'"
        ) from None


def _read_jsonl(path: Path, source: SourceConfig) -> NumberedRows:
    for number, line in enumerate(lines_of(text_chunks(path)), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number} {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} must be a JSON object with columns")
        yield number, row


def _read_json(path: Path, source: SourceConfig) -> NumberedRows:
    text = decode(path)
    try:
        content = parse_json(text)
    except DuplicateKeyError as error:
        raise ValueError(f"{_row_with_duplicate_key(text)} {error}") from None
    except ValueError as error:
        raise ValueError(f"it {error}") from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("it must be a JSON list of objects")
    yield from enumerate(content, start=1)


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


def _read_csv(path: Path, source: SourceConfig) -> NumberedRows:
    """Rows by the names of the header; a row may be shorter. Raises ValueError that names the first wrong
    line."""
    tabs = path.suffix.lower() == ".tsv"
    header: list[str] | None = None
    count = 0
    for line, cells in _csv_lines(path, tabs):
        if header is None:
            if cells:
                header = _checked_header(cells, tabs)
        elif len(cells) > len(header):
            raise ValueError(f"line {line} has more cells than the header")
        elif cells:
            count += 1
            yield count, dict(zip_longest(header, cells))


def _csv_lines(path: Path, tabs: bool) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, cells) of each row of a table."""
    # tab-separated corpora (Common Voice) contain bare quotation marks; with commas, an unclosed one would
    # swallow rows
    dialect: dict[str, Any] = {"strict": True}
    if tabs:
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    lines = (f"{line}\n" for line in lines_of(text_chunks(path)))
    reader = csv.reader(lines, **dialect)
    # the csv module's limit of 128 KiB per cell is less than a long source file has
    longest = path.stat().st_size
    while True:
        begin = reader.line_num + 1
        limit = csv.field_size_limit()
        csv.field_size_limit(max(longest, limit))
        try:
            cells = next(reader, None)
        except csv.Error as error:
            hint = ": a quotation mark is not closed, or stands undoubled in a quoted cell"
            if tabs:
                hint = ""
            raise ValueError(f"line {begin}: {error}{hint}") from None
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        yield begin, cells


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


def _read_parquet(path: Path, source: SourceConfig) -> NumberedRows:
    import pyarrow.parquet as parquet

    count = 0
    try:
        # with a buffer, no row group is read as a whole
        with parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER) as file:
            twice = _first_duplicate([_name_of(field) for field in file.schema_arrow])
            if twice is not None:
                raise ValueError(f"has the column {twice!r} twice: one of them would be lost")
            for batch in file.iter_batches(batch_size=_rows_per_batch(file.metadata)):
                yield from enumerate(batch.to_pylist(), start=count + 1)
                count += batch.num_rows
    except Exception as error:  # a damaged file raises many types, of pyarrow and of Python
        raise ValueError(first_line(error)) from None


def _rows_per_batch(metadata: Any) -> int:
    """Rows of a parquet file that are read at once."""
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    row_size = max(1, size // max(1, metadata.num_rows))
    return max(1, min(BATCH_ROWS, BATCH_BYTES // row_size))


def _name_of(field: Any) -> str:
    """The name of a column. Raises ValueError if a structure in it has a name twice."""
    names = [_name_of(field.type.field(i)) for i in range(getattr(field.type, "num_fields", 0))]
    twice = _first_duplicate(names)
    if twice is not None:
        raise ValueError(f"has {twice!r} twice in column {field.name!r}: one of them would be lost")
    return str(field.name)


def _read_text(path: Path, source: SourceConfig) -> NumberedRows:
    parts: Iterator[str]
    if source.sample_by == "line":
        parts = lines_of(text_chunks(path))
    elif source.sample_by == "paragraph":
        parts = paragraphs_of(lines_of(text_chunks(path)))
    else:
        parts = iter([decode(path)])
    for number, part in enumerate(parts, start=1):
        yield number, {"text": part}


READERS: dict[str, Callable[[Path, SourceConfig], NumberedRows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
