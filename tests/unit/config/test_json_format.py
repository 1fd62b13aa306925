"""JSON is read without losing a value, and what cannot be read is named in one line."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.config.json_format import (
    DuplicateKeyError,
    parse_json,
    parse_json_at,
    parse_object,
    read_object,
)


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5, null, true, "x\u2028"]}', b'{"a": [1, 2.5, null, true, "x\xe2\x80\xa8"]}']
)
def test_values_are_read_from_text_and_bytes(text: str | bytes) -> None:
    assert parse_json(text) == parse_object(text) == {"a": [1, 2.5, None, True, "x\u2028"]}


def test_rows_may_hold_numbers_that_are_missing_and_files_of_ours_may_not() -> None:
    assert math.isnan(parse_json('{"a": NaN}')["a"])
    for constant in ("NaN", "Infinity", "-Infinity"):
        with pytest.raises(ValueError, match=f"holds {constant}, which is not a JSON number"):
            parse_object(f'{{"a": [{constant}]}}')


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON: Expecting value (column 1)"),
        ('{"a": \n 1', "is not JSON: Expecting ',' delimiter (line 2, column 3)"),
        ('{"a": {"b": 1, "b": 2}}', "has the key 'b' twice: one of the values would be lost"),
        ("[" * 100_000, "is nested too deeply to be read"),
        ('{"a": ' + "9" * 5000 + "}", "holds a number of thousands of digits: write it as text"),
        (b'{"a": "\xff"}', "is not UTF-8 text (byte 7)"),
    ],
)
def test_unreadable_json_is_named_in_one_line(text: str | bytes, reason: str) -> None:
    for parse in (parse_json, parse_object):
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
            parse(text)


def test_duplicate_key_is_an_error_of_its_own() -> None:
    with pytest.raises(DuplicateKeyError):
        parse_json('{"a": 1, "a": 1}')


@pytest.mark.parametrize("text", ["[1]", '"a"', "1", "null"])
def test_other_values_are_no_object(text: str) -> None:
    with pytest.raises(ValueError, match="is not a JSON object"):
        parse_object(text)


def test_place_of_a_row_is_named() -> None:
    assert parse_json_at("a.jsonl:3", "[1]") == [1]
    with pytest.raises(UserError, match=r"^a\.jsonl:3: is not JSON"):
        parse_json_at("a.jsonl:3", "{")


def test_file_that_cannot_be_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    with pytest.raises(
        UserError, match=r"run\.json: cannot be read \(No such file or directory\): put it back"
    ):
        read_object(file, "put it back")
    for content in (b"[1]", b"\xff", b"{", b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"run\.json: is damaged \(it .*\): put it back"):
            read_object(file, "put it back")
    file.write_text('{"a": 1}')
    assert read_object(file, "put it back") == {"a": 1}
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"run\.json: is not a regular file: put it back"):
        read_object(file, "put it back")
