"""Rows come out of every kind of source, or one error says why not."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from flora_train.config.errors import UserError
from flora_train.config.task_schema import TaskConfig
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
    assert [row["text"] for row in rows_of(files=["e.jsonl", "d/*.jsonl", "d/1.jsonl"])] == [
        "e.jsonl",
        "d/1.jsonl",
        "d/2.jsonl",
    ]
    assert rows_of(files="odd[1].jsonl") == [{"text": "odd[1].jsonl"}]


def test_shipped_files_are_found_from_any_folder_by_name_and_by_glob(write) -> None:
    write("other.txt", "x")
    assert rows_of(files="assets/code/lua.validation.jsonl")
    assert len(rows_of(files="assets/code/*.validation.jsonl")) > len(
        rows_of(files="assets/code/lua.validation.jsonl")
    )


def test_folder_of_code_is_one_row_a_file_without_hidden_ones(write) -> None:
    for name in ("src/b.lua", "src/deep/a.lua", "src/c.py", "src/.git/x.lua", "src/.hidden.lua"):
        write(name, f"-- {name}\n")
    found = rows_of(folder="src", glob="**/*.lua")
    assert found == [
        {"text": "-- src/b.lua\n", "path": "b.lua"},
        {"text": "-- src/deep/a.lua\n", "path": "deep/a.lua"},
    ]


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
        ("a.docx", b"x", "is of an unknown type; known types are .csv, .json"),
        ("a.jsonl", b'{"a": 1}\n{"text": "one", "text": "two"}', "line 2 has the key 'text' twice"),
        ("a.jsonl", b'{"a": {"b": [{"c": 1, "c": 2}]}}', "line 1 has the key 'c' twice"),
        ("a.json", b'[{"a": 1},\n {"b": "{}"},\n {"a": 1, "a": 2}]', "row 3 (line 3) has the key 'a' twice"),
        pytest.param("a.jsonl", b"[" * 100_000, "line 1 is nested too deeply", id="deep-jsonl"),
        pytest.param(
            "a.json", b'[{"a": ' + b"[" * 100_000 + b"}]", "it is nested too deeply", id="deep-json"
        ),
        pytest.param(
            "a.jsonl",
            b'{"a": ' + b"9" * 5000 + b"}",
            "line 1 holds a number of thousands of digits",
            id="digits",
        ),
        ("a.csv", b"text,text\nalpha,beta\n", "line 1 has the column 'text' twice"),
        ("a.tsv", b"a\tb\ta\n1\t2\t3\n", "line 1 has the column 'a' twice"),
        ("a.csv", b"a,,\n1,2,3\n", "line 1 has several columns without a name"),
        (
            "a.csv",
            b'text\none\n"two\nthree\nfour\n',
            "line 3: unexpected end of data: a quotation mark is not closed",
        ),
        ("a.csv", b'text\n"one"two\n', "line 2: ',' expected after '\"': a quotation mark"),
        (
            "a.csv",
            b"question;answer\n1;2\n",
            "line 1 is one column, 'question;answer': there must be commas between cells",
        ),
        (
            "a.tsv",
            b"question,answer\n1,2\n",
            "line 1 is one column, 'question,answer': there must be tabs between cells",
        ),
        (
            "a.csv",
            "a\n\u00fc\n".encode("utf-16"),
            "is not UTF-8 text (byte 0): it is UTF-16: save it as UTF-8",
        ),
        ("a.txt", "ab".encode("utf-16-le"), "is not text: character 1 is a zero"),
        ("a.csv", b"a\nb\0c\n", "is not text: character 3 is a zero"),
        ("a.jsonl", gzip.compress(b'{"a": 1}', mtime=0), "it is compressed (gzip): unpack it"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0), "is of an unknown type"),
        ("a", b"x", "is of an unknown type"),
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
    line = refusal(files="assets/udhr_local/no-such-language.jsonl")
    assert line.endswith("; build it with: python assets/build_many_languages.py")
    line = refusal(files="assets/clinical_local/no-such-chapter.jsonl")
    assert line.endswith("; build it with: python assets/build_clinical_corpus.py")
    assert refusal(files="full/*.jsonl").startswith("tasks.t.train = 'full/*.jsonl': no such file")
    assert refusal(files="full") == (
        "tasks.t.train = 'full': is a folder: write tasks.t.train.folder=full and tasks.t.train.glob=PATTERN"
    )
    assert refusal(folder="none") == f"tasks.t.train.folder = 'none': no such folder in {tmp_path}"
    assert refusal(folder="full", glob="*.py") == "tasks.t.train.glob = '*.py': matches no file in full"
    assert refusal(folder="full", glob="/*.py").startswith(
        "tasks.t.train.glob = '/*.py': is not a pattern below the folder"
    )


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
        "tasks.t.train.hub = 'nobody/nothing': is not in the local cache, and HF_HUB_OFFLINE forbids access "
        "to the hub: unset it. "
        "Instead, use files or a folder\n"
    ), done.stderr


def test_unclosed_quote_deep_in_a_table_names_the_line_where_it_is_opened(write) -> None:
    rows = "".join(f"alpha beta {i}\n" for i in range(100))
    write("rows.csv", f'text\n{rows}"gamma starts a quote\n{rows * 4}')
    assert "line 102: " in refusal(files="rows.csv")


def test_quoted_cells_may_hold_quotes_commas_and_lines(write) -> None:
    write("rows.csv", 'a,b\r\n"x ""y"", z","one\r\ntwo"\r\n5" disk,\'\r\n')
    assert rows_of(files="rows.csv") == [{"a": 'x "y", z', "b": "one\ntwo"}, {"a": '5" disk', "b": "'"}]


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_columns_and_fields_of_one_name_are_an_error(tmp_path: Path, nested: bool) -> None:
    values = [pyarrow.array(["x"]), pyarrow.array(["y"])]
    both = pyarrow.StructArray.from_arrays(values, names=["a", "a"])
    table = pyarrow.Table.from_arrays([both] if nested else values, names=["s"] if nested else ["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "'a' twice" in refusal(files=str(tmp_path / "rows.parquet"))


def test_pipes_and_devices_are_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("rows.jsonl", "zero.txt"):
        assert "is not a regular file" in refusal(files=str(tmp_path / name))


@pytest.mark.parametrize(
    "name", ["a\0b", "~nobody_of_this_name/x"]
)  # too long ones are refused by the schema
@pytest.mark.parametrize("key", ["files", "folder", "common_voice"])
def test_names_that_no_file_can_have_are_one_error(name: str, key: str) -> None:
    more = {"locale": "cs"} if key == "common_voice" else {}
    assert refusal(**{key: name + ("" if key != "files" else ".jsonl")}, **more).startswith("tasks.t.train")


def test_links_that_lead_back_are_entered_once_and_no_file_is_read_twice_for_them(
    write, tmp_path: Path
) -> None:
    for name in ("d/a.jsonl", "d/e/b.jsonl", "d/.hidden/c.jsonl", "d/e/.x.jsonl"):
        write(name, [{"text": name}])
    for number in range(3):
        (tmp_path / f"d/e/back{number}").symlink_to(tmp_path / "d")
    assert [row["text"] for row in rows_of(files="d/**/*.jsonl")] == ["d/a.jsonl", "d/e/b.jsonl"]
    assert [row["text"] for row in rows_of(files="**/b.json*")] == ["d/e/b.jsonl"]
    assert [row["path"] for row in rows_of(folder="d", glob="**/*.jsonl")] == ["a.jsonl", "e/b.jsonl"]


def test_a_thousand_files_are_read_as_one_source(write) -> None:
    for number in range(1000):
        write(f"d/{number:04}.txt", f"{number}\n")
    assert [row["text"] for row in rows_of(files="d/*.txt")] == [str(number) for number in range(1000)]


def test_binary_text_without_a_wrong_byte_is_found_by_its_zeros(write) -> None:
    write("src/a.lua", "x")
    write("src/b.lua", b"\x7fELF\0\0")
    assert refusal(folder="src") == (
        "tasks.t.train = 'src/b.lua': is not text: character 4 is a zero, as in binary files and in "
        "UTF-16: narrow tasks.t.train.glob"
    )
