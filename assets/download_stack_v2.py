"""Downloads source code of The Stack v2, whose data sets on the hub hold only identifiers of files.

    python assets/download_stack_v2.py --language Lua --rows 20000 --out lua.jsonl
    python assets/download_stack_v2.py --ids rows.parquet --rows 20000 --out lua.jsonl

Before it runs, accept the terms of the data set on the hub and log in (`hf auth login`). They say that bulk
downloads need an agreement with Software Heritage and Inria (datasets@softwareheritage.org), that training
must follow Software Heritage's principles for language models, that the licence of each file holds, and that
a copy is to be updated when files are withdrawn. The files come from Software Heritage's public bucket.

A row of OUT has the columns content, path, repo_name, language, license_type, detected_licenses and blob_id.
The same call continues where an interrupted one stopped. Files that are missing, cannot be decoded or have no
permissive licence (`--licences all` keeps these) are left out and counted.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

DATA_SET = "bigcode/the-stack-v2-dedup"
CONTENTS = "https://softwareheritage.s3.amazonaws.com/content"
COLUMNS = ("path", "repo_name", "language", "license_type", "detected_licenses", "blob_id")
TRIES, LONGEST_WAIT, TIMEOUT = 6, 60.0, 60.0
"""Of a file: attempts, seconds between two of them at most, and seconds until the server is given up on."""
BATCH = 64
"""Files that are requested before any of them is written."""


class Missing(Exception):
    """A file that cannot be used; its text is the reason, as it is counted."""


@dataclass
class Download:
    """The file that is written, and what is in it."""

    out: Path
    known: set[str] = field(default_factory=set)
    """Identifiers of the files in it."""
    left_out: Counter[str] = field(default_factory=Counter)

    @classmethod
    def resumed(cls, out: Path) -> Download:
        """What an earlier call wrote. A line that it did not finish is cut off."""
        download = cls(out)
        if not out.exists():
            return download
        end = 0
        with out.open("rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                download.known.add(json.loads(line)["blob_id"])
                end += len(line)
            file.truncate(end)
        return download

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows, which are on disk when this returns."""
        with self.out.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self.known.add(row["blob_id"])
            file.flush()
            os.fsync(file.fileno())


def files_of(rows: Iterable[dict[str, Any]], language: str | None) -> Iterator[dict[str, Any]]:
    """One row for each file, also where the data set has one for each repository (train-smol-ids)."""
    for row in rows:
        files = row["files"] if "blob_id" not in row and "files" in row else [row]
        for file in files:
            if language is None or str(file.get("language", language)).lower() == language.lower():
                yield {"repo_name": row.get("repo_name"), **file}


def fetch(file: dict[str, Any], contents: str) -> str:
    """The text of a file. Raises Missing, or OSError if the server does not answer."""
    url = f"{contents.rstrip('/')}/{quote(file['blob_id'])}"
    for attempt in range(TRIES):
        try:
            with urlopen(url, timeout=TIMEOUT) as answer:
                raw = answer.read()
            break
        except HTTPError as error:
            if error.code in (403, 404):
                raise Missing("not in the bucket") from error
            if error.code not in (429, 500, 502, 503, 504) or attempt == TRIES - 1:
                raise
            wait = error.headers.get("Retry-After", "")
        except (OSError, HTTPException) as error:  # a connection that is refused or ends early
            if attempt == TRIES - 1:
                raise OSError(f"{url}: {error or type(error).__name__}") from error
            wait = ""
        seconds = float(wait) if wait.isdigit() else 2.0**attempt
        time.sleep(min(LONGEST_WAIT, seconds))
    return decode(raw, str(file.get("src_encoding") or "UTF-8"))


def decode(raw: bytes, encoding: str) -> str:
    """The text of a compressed file. Raises Missing."""
    try:
        return gzip.decompress(raw).decode(encoding)
    except (OSError, EOFError, zlib.error) as error:
        raise Missing("damaged") from error
    except (UnicodeDecodeError, LookupError) as error:
        raise Missing("not in the encoding that it is listed with") from error


def download(
    files: Iterable[dict[str, Any]],
    target: Download,
    rows: int,
    *,
    contents: str,
    workers: int,
    licences: str,
) -> None:
    """Write texts until the file has `rows` of them."""

    def text_of(file: dict[str, Any]) -> dict[str, Any] | str:
        try:
            content = fetch(file, contents)
        except Missing as reason:
            return str(reason)
        return {"content": content, **{name: file.get(name) for name in COLUMNS}}

    wanted = (file for file in files if is_wanted(file, target, licences))
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(islice(wanted, min(BATCH, rows - len(target.known)))):
            answers = list(pool.map(text_of, batch))
            target.left_out.update(answer for answer in answers if isinstance(answer, str))
            target.add(answer for answer in answers if not isinstance(answer, str))
            print(f"\r{len(target.known):,} of {rows:,} files", end="", file=sys.stderr, flush=True)


def is_wanted(file: dict[str, Any], target: Download, licences: str) -> bool:
    """Whether a file is to be downloaded; counts those that are not, except for those that are there."""
    if file["blob_id"] in target.known:
        return False
    if licences == "permissive" and file.get("license_type") != "permissive":
        target.left_out["without a permissive licence"] += 1
        return False
    return True


def listed_rows(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """The rows of identifiers: a local file, or a data set on the hub."""
    import datasets

    if options.ids is not None:
        kind = {".parquet": "parquet"}.get(options.ids.suffix, "json")
        return datasets.load_dataset(kind, data_files=str(options.ids), split="train", streaming=True)
    grouped = "train" in options.data_set
    subset = None if grouped else options.language
    return datasets.load_dataset(options.data_set, subset, split="train", streaming=True)


def main(words: Sequence[str] | None = None) -> None:
    """words: the command line. Default: that of the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--language", help="as the data set spells it: Lua, C++, Rust")
    parser.add_argument("--data-set", default=DATA_SET)
    parser.add_argument("--ids", type=Path, help="a .parquet or .jsonl of its rows, in place of the hub")
    parser.add_argument("--rows", type=int, required=True, help="files to write")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contents", default=CONTENTS, help="where the files are, by identifier")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--licences", choices=("permissive", "all"), default="permissive")
    options = parser.parse_args(words)
    if options.language is None and options.ids is None:
        parser.error("give --language, or rows with --ids")
    target = Download.resumed(options.out)
    settings = {name: getattr(options, name) for name in ("contents", "workers", "licences")}
    try:
        download(files_of(listed_rows(options), options.language), target, options.rows, **settings)
    except Exception as error:  # the hub's client raises many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        sys.exit(f"\nerror: {reason}; the same command continues after {len(target.known):,} files")
    print(f"\r{len(target.known):,} files in {options.out}", file=sys.stderr)
    for reason, count in target.left_out.most_common():
        print(f"left out, {reason}: {count:,}", file=sys.stderr)
    if not target.known:
        sys.exit("error: no file was downloaded: check --language, which is spelt as in the data set")


if __name__ == "__main__":
    main()
