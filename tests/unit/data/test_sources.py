"""Rows come out of every kind of source, or one error says why not."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from flora_train.config.errors import UserError
from flora_train.config.task_schema import SourceConfig, TaskConfig
from flora_train.data.sources import READERS, read_rows
from tests.forked import python

ROWS = [{"a": "one", "b": "x,y"}, {"a": 'tw"o', "b": "zweiß\nlines"}]


def rows_of(**source: Any) -> list[dict[str, Any]]:
    return read_rows(TaskConfig(train=source).train, "tasks.t.train")


def refusal(**source: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(**source)
    (problem,) = caught.value.problems
    assert "\n" not in str(problem)
    return str(problem)


def as_csv(rows: list[dict[str, str]]) -> str:
    quoted = [[value.replace('"', '""') for value in row.values()] for row in rows]
    return "a,b\n" + "".join(f'"{a}","{b}"\n' for a, b in quoted)


WRITERS = {
    ".jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS)),
    ".json": lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8"),
    ".csv": lambda path: path.write_text(as_csv(ROWS), encoding="utf-8"),
    ".parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_of_a_file_are_what_was_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    assert rows_of(files=str(path)) == ROWS


def test_every_kind_of_file_is_tested_here() -> None:
    assert set(READERS) == {*WRITERS, ".tsv", ".txt"}


def test_tab_separated_files_keep_bare_quotation_marks(write) -> None:
    write("rows.tsv", 'a\tb\n"x\ty"\n')
    assert rows_of(files="rows.tsv") == [{"a": '"x', "b": 'y"'}]


@pytest.mark.parametrize(
    ("sample_by", "parts"),
    [
        ("line", ["one", "two\u2028still two", "", "", "three"]),
        ("paragraph", ["one\ntwo\u2028still two", "three"]),
        ("document", ["one\ntwo\u2028still two\n\n\nthree\n"]),
    ],
)
def test_text_is_cut_by_line_paragraph_or_document(write, sample_by: str, parts: list[str]) -> None:
    write("rows.txt", "one\r\ntwo\u2028still two\n\n\nthree\n")
    assert [row["text"] for row in rows_of(files="rows.txt", sample_by=sample_by)] == parts


def test_mark_that_windows_puts_first_is_not_part_of_a_column(write) -> None:
    write("rows.csv", "\ufefftext\nhello\n")
    assert rows_of(files="rows.csv") == [{"text": "hello"}]


def test_line_separators_inside_json_text_do_not_cut_a_row(write) -> None:
    write("rows.jsonl", [{"text": "a\u2028b\x85c\x0cd"}])
    assert rows_of(files="rows.jsonl") == [{"text": "a\u2028b\x85c\x0cd"}]


def test_csv_cell_may_be_longer_than_the_csv_modules_limit_which_stays(write) -> None:
    before = csv.field_size_limit()
    write("rows.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(rows_of(files="rows.csv")[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_missing_csv_cells_are_missing_values(write) -> None:
    write("rows.csv", "a,b\n1\n2,3\n")
    assert rows_of(files="rows.csv") == [{"a": "1", "b": None}, {"a": "2", "b": "3"}]


def test_globs_and_lists_of_files_are_read_in_order_and_no_file_twice(write) -> None:
    for name in ("d/2.jsonl", "d/1.jsonl", "e.jsonl", "odd[1].jsonl"):
        write(name, [{"text": name}])
    assert [row["text"] for row in rows_of(files=["e.jsonl", "d/*.jsonl", "d/1.jsonl"])] == ["e.jsonl", "d/1.jsonl", "d/2.jsonl"]
    assert rows_of(files="odd[1].jsonl") == [{"text": "odd[1].jsonl"}]


def test_shipped_files_are_found_from_any_folder_by_name_and_by_glob(write) -> None:
    write("other.txt", "x")
    assert rows_of(files="assets/code/lua.validation.jsonl")
    assert len(rows_of(files="assets/code/*.validation.jsonl")) > len(rows_of(files="assets/code/lua.validation.jsonl"))


def test_folder_of_code_is_one_row_a_file_without_hidden_ones(write) -> None:
    for name in ("src/b.lua", "src/deep/a.lua", "src/c.py", "src/.git/x.lua", "src/.hidden.lua"):
        write(name, f"-- {name}\n")
    found = rows_of(folder="src", glob="**/*.lua")
    assert found == [{"text": "-- src/b.lua\n", "path": "b.lua"}, {"text": "-- src/deep/a.lua\n", "path": "deep/a.lua"}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "line 3 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 must be a JSON object"),
        ("a.json", b'{"a": 1}', "must be a JSON list of objects"),
        ("a.json", b"[1]", "must be a JSON list of objects"),
        ("a.json", b"[{]", "cannot be read"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"a,b\n", "holds no rows"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has more cells than the header"),
        ("a.csv", b"a\n\xff\n", "is not UTF-8 text (byte 2)"),
        ("a.tsv", b"a\n\xff\n", "is not UTF-8 text (byte 2)"),
        ("a.txt", b"\xe9t\xe9", "is not UTF-8 text (byte 0)"),
        ("a.jsonl", b'{"a": "\xff"}', "is not UTF-8 text (byte 7)"),
        ("a.parquet", b"PAR1 or not", "cannot be read"),
        ("a.docx", b"x", "unknown kind of file; there are .csv, .json"),
        ("a", b"x", "unknown kind of file"),
    ],
)
def test_unusable_file_is_one_error_that_names_it(write, name: str, content: bytes, reason: str) -> None:
    write(name, content)
    line = refusal(files=name)
    assert line.startswith("tasks.t.train = ")
    assert name in line
    assert reason in line


def test_missing_files_and_folders_name_the_key_and_where_was_looked(write, tmp_path: Path) -> None:
    write("full/a.lua", "x")
    assert refusal(files="none.jsonl") == f"tasks.t.train = 'none.jsonl': no such file in {tmp_path}"
    assert refusal(files="full/*.jsonl").startswith("tasks.t.train = 'full/*.jsonl': no such file")
    assert (
        refusal(files="full")
        == "tasks.t.train = 'full': is a folder: write tasks.t.train.folder=full and tasks.t.train.glob=PATTERN"
    )
    assert refusal(folder="none") == f"tasks.t.train.folder = 'none': no such folder in {tmp_path}"
    assert refusal(folder="full", glob="*.py") == "tasks.t.train.glob = '*.py': matches no file in full"
    assert refusal(folder="full", glob="/*.py").startswith("tasks.t.train.glob = '/*.py': is not a pattern below the folder")


def test_binary_file_in_a_folder_of_code_is_an_error_not_a_skipped_row(write) -> None:
    write("src/a.lua", "x")
    write("src/logo.png", b"\x89PNG\xff")
    line = refusal(folder="src")
    assert "logo.png" in line
    assert line.endswith("narrow tasks.t.train.glob")


def test_hub_name_while_offline_says_so_and_what_to_do() -> None:
    code = (
        "from flora_train.config.task_schema import SourceConfig\n"
        "from flora_train.data.sources import read_rows\n"
        "from flora_train.config.errors import UserError\n"
        "try:\n    read_rows(SourceConfig(hub='nobody/nothing'), 'tasks.t.train')\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = python("-c", code, environment={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.stdout == (
        "tasks.t.train.hub = 'nobody/nothing': is not in the local cache, and HF_HUB_OFFLINE says there is no hub: unset it. "
        "Instead of it: files or a folder\n"
    ), done.stderr


class Gate(Exception):
    """As the hub's client words it."""


@pytest.mark.parametrize("stand_in", [None, "data_config=local"])
def test_gated_hub_data_says_how_to_get_it_and_what_can_stand_in(monkeypatch: pytest.MonkeyPatch, stand_in: str | None) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise Gate("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it.")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    line = refusal(hub="a/b", data_dir="data/lua", stand_in=stand_in)
    assert "is gated: accept its terms on https://huggingface.co/datasets/a/b, then run `hf auth login`" in line
    assert line.endswith(f"Instead of it: {stand_in or 'files or a folder'}")


def test_a_limit_on_hub_rows_streams_and_reads_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def load(*args: object, **options: object) -> Iterator[dict[str, int]]:
        asked.update(options)
        return ({"n": n} for n in itertools.count())

    monkeypatch.setattr("datasets.load_dataset", load)
    source = SourceConfig(hub="a/b", data_dir="data/lua", max_rows=3)
    assert read_rows(source, "tasks.t.train") == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert asked["streaming"] is True
    assert asked["data_dir"] == "data/lua"
