"""assets/download_stack_v2.py against a hub and a bucket on loopback: contents, failures, continuation."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assets.download_stack_v2 import main
from tests.forked import ROOT
from tests.hub_server import TOKEN, serve

NAME = "bigcode/the-stack-v2-dedup"
TEXTS = {
    "first": ("local x = 1\n", "UTF-8"),
    "latin": ("-- caf\u00e9\nreturn 1\n", "ISO-8859-1"),
    "wide": ("-- \u65e5\u672c\u8a9e\n", "UTF-16"),
    "last": ("return {}\n", "UTF-8"),
}


@dataclass
class Bucket:
    """The files of a server, what was asked of it, and how often it fails before it answers."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    faults: list[int | str] = field(default_factory=list)
    """A status, or "short" for an answer that ends early; each is used once."""
    url: str = ""


@contextmanager
def serving() -> Iterator[Bucket]:
    bucket = Bucket()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            bucket.asked.append(name)
            fault = bucket.faults.pop(0) if bucket.faults else None
            body = bucket.files.get(name, b"")
            status = 200 if name in bucket.files else 404
            if isinstance(fault, int):
                status, body = fault, b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fault == "short" else body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}/content"
    Thread(target=server.serve_forever, daemon=True).start()
    yield bucket
    server.shutdown()


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with serving() as bucket:
        yield bucket


def row_of(bucket: Bucket, name: str, **changes: Any) -> dict[str, Any]:
    """A row of the data set for a file of TEXTS, whose content is in the bucket."""
    text, encoding = TEXTS[name]
    raw = text.encode(encoding)
    identifier = hashlib.sha1(raw).hexdigest()
    bucket.files[identifier] = gzip.compress(raw)
    row = {"blob_id": identifier, "path": f"/{name}.lua", "repo_name": "a/b", "language": "Lua"}
    return {
        **row,
        "license_type": "permissive",
        "detected_licenses": ["MIT"],
        "src_encoding": encoding,
        **changes,
    }


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str]:
    """The script in this process: (exit status or message, standard error)."""
    status: object = 0
    try:
        main([str(word) for word in words])
    except SystemExit as ended:
        status = ended.code
    return status, capsys.readouterr().err


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "assets" / "download_stack_v2.py")
    command = [sys.executable, script, *map(str, words)]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def written(file: Path) -> list[str]:
    return [json.loads(line)["path"] for line in file.read_text(encoding="utf-8").splitlines()]


def test_code_of_a_language_is_downloaded_by_the_hub_s_rows(bucket: Bucket, tmp_path: Path) -> None:
    folder, out = tmp_path / "stack", tmp_path / "lua.jsonl"
    rows = [row_of(bucket, name) for name in TEXTS]
    write_rows(folder / "data" / "Lua" / "train-00000-of-00001.parquet", rows)
    card = "configs:\n- config_name: Lua\n  data_files:\n  - split: train\n    path: data/Lua/*.parquet\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")
    with serve() as hub:
        hub.add_folder(NAME, folder, repo_type="dataset", gated=True)
        where = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        words = ["--language", "Lua", "--rows", 10, "--out", out, "--contents", bucket.url]
        refused = run(*words, **where, HF_TOKEN="")
        assert refused.returncode == 1
        assert refused.stderr.strip().startswith("error: ")
        done = run(*words, **where, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    contents = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["content"] for row in contents] == [text for text, _ in TEXTS.values()]
    assert contents[0] == {
        "content": "local x = 1\n",
        **{name: rows[0][name] for name in contents[0] if name != "content"},
    }
    assert contents[0]["detected_licenses"] == ["MIT"]


def test_rows_of_repositories_are_read_file_by_file(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [row_of(bucket, "first"), row_of(bucket, "latin", language="Perl"), row_of(bucket, "last")]
    for file in files:
        del file["repo_name"]
    ids = write_rows(tmp_path / "ids.jsonl", [{"repo_name": "who/what", "files": files}])
    out = tmp_path / "lua.jsonl"
    status, said = call(
        capsys, "--ids", ids, "--language", "lua", "--rows", 9, "--out", out, "--contents", bucket.url
    )
    assert status == 0, said
    assert written(out) == ["/first.lua", "/last.lua"]
    assert json.loads(out.read_text(encoding="utf-8").splitlines()[0])["repo_name"] == "who/what"


def test_files_that_cannot_be_used_are_left_out_and_counted(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row_of(bucket, "first"),
        row_of(bucket, "latin", src_encoding="UTF-8"),
        row_of(bucket, "wide", license_type="no_license"),
        {**row_of(bucket, "last"), "blob_id": "absent"},
        {**row_of(bucket, "last"), "blob_id": "broken"},
    ]
    bucket.files["broken"] = gzip.compress(b"x" * 100)[:20]
    ids = write_rows(tmp_path / "ids.parquet", rows)
    out = tmp_path / "lua.jsonl"
    words = ["--ids", ids, "--rows", 9, "--out", out, "--contents", bucket.url]
    status, said = call(capsys, *words)
    assert status == 0, said
    assert written(out) == ["/first.lua"]
    for reason in (
        "not in the encoding that it is listed with: 1",
        "without a permissive licence: 1",
        "not in the bucket: 1",
        "damaged: 1",
    ):
        assert f"left out, {reason}\n" in said
    status, said = call(capsys, *words, "--licences", "all")
    assert status == 0, said
    assert written(out) == ["/first.lua", "/wide.lua"]


def test_server_errors_are_tried_again_and_a_later_call_continues(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row_of(bucket, name) for name in TEXTS]
    ids, out = write_rows(tmp_path / "ids.jsonl", rows), tmp_path / "lua.jsonl"
    words = ["--ids", ids, "--out", out, "--contents", bucket.url, "--workers", 1]
    bucket.faults = [503, 429, "short"]
    status, said = call(capsys, *words, "--rows", 2)
    assert status == 0, said
    assert written(out) == ["/first.lua", "/latin.lua"]
    assert len(bucket.asked) == 5
    with out.open("a") as file:
        file.write('{"content": "half')  # as a kill leaves it
    bucket.asked.clear()
    bucket.faults = [500] * 6
    status, said = call(capsys, *words, "--rows", 4)
    assert status != 0
    assert "the same command continues after 2 files" in str(status)
    status, said = call(capsys, *words, "--rows", 4)
    assert status == 0, said
    assert written(out) == ["/first.lua", "/latin.lua", "/wide.lua", "/last.lua"]
    assert not set(bucket.asked) & {row["blob_id"] for row in rows[:2]}


def test_a_language_that_is_spelt_otherwise_is_named(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = write_rows(tmp_path / "ids.jsonl", [row_of(bucket, "first")])
    status, _ = call(
        capsys,
        "--ids",
        ids,
        "--language",
        "Luau",
        "--rows",
        4,
        "--out",
        tmp_path / "x",
        "--contents",
        bucket.url,
    )
    assert status != 0
    assert "no file was downloaded: check --language" in str(status)
