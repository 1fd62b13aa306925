"""An edited eval/languages.yaml is a valid table, or one clear error for each wrong row and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_train.config.errors import UserError
from flora_train.evaluation.code.programs.languages import TABLE, load_languages

ROWS: dict[str, Any] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.sampled_from(["(", "[", "*", "(?P<", "../x", "/etc/passwd"]),
)


def said(content: str | bytes, folder: Path) -> list[str]:
    table = folder / "languages.yaml"
    table.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as caught:
        load_languages(table=table)
    return [str(problem).removeprefix(str(table)) for problem in caught.value.problems]


@pytest.mark.parametrize(
    "content", ["", "[]", "a", "1", "null", "{", "a: b", "a: [1]", "lua:", b"\xff\xfe", "[" * 3000]
)
def test_a_file_without_a_table_is_one_error(content: str | bytes, tmp_path: Path) -> None:
    (line,) = said(content, tmp_path)
    assert any(words in line for words in ("must be a mapping", "must have a row", "cannot be read"))
    assert "\n" not in line


def test_a_recursive_row_is_refused_or_read(tmp_path: Path) -> None:
    assert all(line.startswith(": a.") for line in said("a: &a {b: *a}", tmp_path))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"assertion": "("},
            (
                ": lua.assertion = '(': is not a valid regular expression: missing ), unterminated "
                "subpattern at position 0"
            ),
        ),
        (
            {"exits": "*"},
            ": lua.exits = '*': is not a valid regular expression: nothing to repeat at position 0",
        ),
        ({"run": []}, ": lua.run = []: List should have at least 1 item"),
        ({"file": "../out.lua"}, ": lua.file = '../out.lua': String should match pattern"),
        ({"sceonds": 1}, ": lua.sceonds = 1: Extra inputs are not permitted"),
        ({"seconds": 0}, ": lua.seconds = 0: Input should be greater than 0"),
        ({"pass": None}, ": lua.pass: Input should be a valid string"),
        ({"key": "lua"}, ": lua = "),
    ],
)
def test_a_row_that_is_wrong_is_named(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    (found,) = said(yaml.safe_dump({"pl": ROWS["pl"], "lua": {**ROWS["lua"], **changes}}), tmp_path)
    assert found.startswith(line)


def test_all_wrong_rows_are_named_together(tmp_path: Path) -> None:
    found = said(yaml.safe_dump({key: {**ROWS[key], "run": 1} for key in ("pl", "lua")}), tmp_path)
    assert [line.partition(".run")[0] for line in found] == [": lua", ": pl"]


@pytest.mark.attack
@given(key=st.sampled_from(sorted(ROWS)), value=VALUES, data=st.data())
@settings(deadline=None)
def test_any_edit_of_a_row_is_a_table_or_an_error(
    key: str, value: Any, data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    field = data.draw(st.sampled_from([*ROWS[key], "prepare", "compile", "says"]))
    table = tmp_path_factory.getbasetemp() / "edited.yaml"
    table.write_text(yaml.safe_dump({"lua": ROWS["lua"], key: {**ROWS[key], field: value}}), encoding="utf-8")
    problems: tuple[Any, ...] = ()
    try:
        languages = load_languages(table=table)
    except UserError as error:
        problems = error.problems
    else:
        languages[key].error_status("error")
        assert languages[key].how_to_install
    assert all(problem.key.startswith(f"{table}: {key}") for problem in problems)
