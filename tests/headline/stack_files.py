"""Files in the layout of bigcode/the-stack-dedup: its columns, shards and row groups, and odd contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.headline.code_sources import SourceFile

SHARDS = 3
EVENTS = ("stars", "issues", "forks")
TIMES = {
    "stars": "max_stars_repo_stars_event",
    "issues": "max_issues_repo_issues_event",
    "forks": "max_forks_repo_forks_event",
}


def _schema() -> pa.Schema:
    """The columns of the data set, as published."""
    columns: list[tuple[str, pa.DataType]] = [
        ("hexsha", pa.string()),
        ("size", pa.int64()),
        ("ext", pa.string()),
        ("lang", pa.string()),
    ]
    for event in EVENTS:
        columns += [
            (f"max_{event}_repo_path", pa.string()),
            (f"max_{event}_repo_name", pa.string()),
            (f"max_{event}_repo_head_hexsha", pa.string()),
            (f"max_{event}_repo_licenses", pa.list_(pa.string())),
            (f"max_{event}_count", pa.int64()),
            (f"{TIMES[event]}_min_datetime", pa.string()),
            (f"{TIMES[event]}_max_datetime", pa.string()),
        ]
    columns += [
        ("content", pa.string()),
        ("avg_line_length", pa.float64()),
        ("max_line_length", pa.int64()),
        ("alphanum_fraction", pa.float64()),
    ]
    return pa.schema(columns)


SCHEMA = _schema()


def write_language(
    folder: Path, files: Sequence[SourceFile], *, extension: str, language: str, row_group: int
) -> None:
    """Write the shards of one language."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(file, extension, language) for file in files]
    for shard in range(SHARDS):
        table = pa.Table.from_pylist(rows[shard::SHARDS], schema=SCHEMA)
        path = folder / f"data-{shard:05}-of-{SHARDS:05}.parquet"
        pq.write_table(table, path, row_group_size=row_group)


def _row(file: SourceFile, extension: str, language: str) -> dict[str, Any]:
    content = file.text
    sha = hashlib.sha1(f"{file.repository}/{file.path}\n{content}".encode()).hexdigest()
    lengths = [len(line) for line in content.split("\n")]
    alphanumeric = sum(map(str.isalnum, content))
    row: dict[str, Any] = {
        "hexsha": sha,
        "size": len(content.encode()),
        "ext": extension,
        "lang": language,
        "content": content,
        "avg_line_length": sum(lengths) / len(lengths),
        "max_line_length": max(lengths),
        "alphanum_fraction": alphanumeric / max(len(content), 1),
    }
    for event in EVENTS:
        row[f"max_{event}_repo_path"] = file.path
        row[f"max_{event}_repo_name"] = f"packages/{file.repository}"
        row[f"max_{event}_repo_head_hexsha"] = sha
        row[f"max_{event}_repo_licenses"] = [file.license]
        row[f"max_{event}_count"] = None
        for end in ("min", "max"):
            row[f"{TIMES[event]}_{end}_datetime"] = None
    row["max_stars_count"] = int(sha[:4], 16) % 1000
    row["max_stars_repo_stars_event_min_datetime"] = "2015-01-01T00:00:00.000Z"
    row["max_stars_repo_stars_event_max_datetime"] = "2022-03-31T23:59:59.000Z"
    return row


def odd_files(files: Sequence[SourceFile], large: bool) -> Iterator[SourceFile]:
    """Real files with everything that files on the web have: a byte order mark, CRLF, NUL, replaced bytes,
    escaped surrogates, emoji, special tokens as text, no content, white space only, one endless line.

    large: also a file of more than 1 MB.
    """
    for number, (name, text) in enumerate(_odd_texts([file.text for file in files[:8]])):
        yield SourceFile("odd", f"{number:02}-{name}", "MIT", text)
    if large:
        rest = "".join(file.text for file in files)
        repeated = rest * (1_100_000 // max(len(rest.encode()), 1) + 1)
        yield SourceFile("odd", "large", "MIT", repeated[:1_100_000] + "\n")


def _odd_texts(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    text = texts[0]
    yield "byte-order-mark", "\ufeff" + text
    yield "crlf", text.replace("\n", "\r\n")
    yield "old-mac", text.replace("\n", "\r")
    yield "nul", text[: len(text) // 2] + "\0" + text[len(text) // 2 :]
    yield "replaced-bytes", text.encode().replace(b"e", b"\xe9").decode(errors="replace")
    yield "escaped-surrogates", "\\ud83d\\ude00 \\udcff\n" + text
    yield "emoji", "\U0001f468‍\U0001f469‍\U0001f467 \U0001f3f4\U000e0067\U000e007f\n" + text
    yield "separators", text.replace("\n", "\u2028", 3) + "\u202e\u200b\x0c\x1b[31m\n"
    yield "special-tokens", "<|endoftext|>\n<fim_prefix>a<fim_suffix>b<fim_middle>\n" + text + "<|endoftext|>"
    yield "empty", ""
    yield "white-space", " \t\n" * 40
    yield "one-line", " ".join(texts).replace("\n", " ")[:60_000]
