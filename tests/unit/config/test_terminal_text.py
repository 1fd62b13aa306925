"""Foreign text is shown on a terminal without being obeyed; a broken stream does not end a command."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from flora_train.config.errors import user_error
from flora_train.config.terminal_text import in_cell, plain, print_table, safe_streams, shown
from flora_train.runtime.progress import ProgressBar

OBEYED = [
    chr(code)
    for code in (
        *range(0x20),
        *range(0x7F, 0xA0),
        0x2028,
        0x2029,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    )
]


def test_plain_makes_every_control_character_visible() -> None:
    for character in OBEYED:
        if character not in "\n\t":
            assert character not in plain(f"a{character}b"), hex(ord(character))
    assert plain("\x1b[31mred\x07") == "\\x1b[31mred\\x07"
    assert plain("\u202egnp.exe") == "\\u202egnp.exe"
    assert plain("\r\x9b2J\x7f") == "\\x0d\\x9b2J\\x7f"


def test_plain_keeps_the_text_that_people_write() -> None:
    for text in (
        "two\n\tlines",
        "naïve – “quoted” ｗｉｄｅ 日本語 עברית العربية हिन्दी 👩‍👩‍👧",
        "می‌خواهم",
        "[/red] {x} $PATH",
    ):
        assert plain(text) == text
    assert plain("a\nb\tc", keep="") == "a\\x0ab\\x09c"


@given(st.text(st.characters(codec=None, exclude_categories=[])))
def test_plain_can_always_be_encoded_and_obeys_nothing(text: str) -> None:
    found = plain(text)
    assert not set(found) & (set(OBEYED) - set("\n\t"))
    found.encode("utf-8")
    assert plain(found) == found


@pytest.mark.parametrize(
    "text", ["[/red]", "[bold]x[/]", "[link=file:///etc]x", ":warning:", "\x1b]0;title\x07", "a\nb"]
)
def test_tables_and_consoles_take_no_markup_from_data(text: str) -> None:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system=None)
    table = Table("name")
    table.add_row(in_cell(text))
    console.print(table, shown(text))
    assert plain(text, keep="") in out.getvalue()
    assert "\x1b]" not in out.getvalue()


@pytest.mark.usefixtures("log_to_stderr")
def test_errors_progress_and_notes_show_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("read \x1b[2Jclips [/x]", 2, line_every=0.0) as watch:
        watch.update(1, {"[/red]": "\x1b[1m"})
    logging.getLogger("flora_train.test").warning("\x1b[31m [/red]")
    error = str(user_error("tasks.\x1b[31m", "\x1b[2J", "has \x1b]0;x\x07 and \u202e\nin it").problems[0])
    said = capsys.readouterr().err + error
    assert "\x1b" not in said
    assert "\x07" not in said
    assert said.count("\\x1b") == 6
    assert "[/red]" in said
    assert "\n" not in error


def test_safe_streams_write_what_they_cannot_encode_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    with safe_streams():
        print("−0.05 [−0.1, é] \ud800")
    assert stream.errors == "strict"
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u22120.05 [\\u22120.1, \\xe9] \\ud800\n"  # type: ignore[attr-defined]


def test_a_table_is_printed_whole_on_a_narrow_terminal() -> None:
    table = Table()
    for heading in ("adapter", "pass@1", "ended"):
        table.add_column(
            heading, no_wrap=heading != "ended", max_width=40 if heading == "ended" else None, overflow="fold"
        )
    table.add_row("x" * 60, "0.000 [0.000, 0.975]", "1 OK, 2 AssertionError")
    file = io.StringIO()
    print_table(table, console := Console(file=file, width=40, soft_wrap=True))
    assert "x" * 60 in file.getvalue()
    assert "0.000 [0.000, 0.975]" in file.getvalue()
    assert "1 OK, 2 AssertionError" in file.getvalue()
    assert console.width == 40
