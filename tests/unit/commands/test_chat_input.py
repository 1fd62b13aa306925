"""What is typed: texts of one or several lines, and commands."""

from __future__ import annotations

import io

import pytest

from flora_train.commands.chat_input import Command, UserInput
from flora_train.config.errors import UserError


def read_all(typed: str, monkeypatch: pytest.MonkeyPatch) -> list[str | Command]:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    reader = UserInput()
    return list(iter(reader.read, None))


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("hello\nyou\n", ["hello", "you"]),
        ("no end", ["no end"]),
        ("\n  \n  hello  \n", ["hello"]),
        ('"""one\n\n  two"""\nthree\n', ["one\n\n  two", "three"]),
        ('"""\na\n\nb\n"""\n', ["a\n\nb"]),
        ('"""\n"""\nx\n', ["x"]),
        ('"""one line"""\n', ["one line"]),
        ('"""never closed\nx\n', ["never closed\nx"]),
        ("/adapter\n", [Command("adapter", ())]),
        ("/adapter  a  b \n", [Command("adapter", ("a", "b"))]),
        ("//etc/hosts\n", ["/etc/hosts"]),
        ("windows\r\n", ["windows"]),
        ("not \udcff UTF-8 \U0001f600\n", ["not \ufffd UTF-8 \U0001f600"]),
        ("", []),
    ],
)
def test_lines_become_texts_and_commands(
    typed: str, expected: list[str | Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_all(typed, monkeypatch) == expected


def test_what_controls_a_terminal_is_shown_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_all("a \x1b[31m\n", monkeypatch) == ["a \x1b[31m"]
    assert capsys.readouterr().out == "you> a \\x1b[31m\n"


def test_unknown_command_has_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"^/adaptor: there are .* Did you mean '/adapter'\? A text that begins"
    ):
        read_all("/adaptor x\n", monkeypatch)
