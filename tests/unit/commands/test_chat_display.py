"""Answers at a terminal: every character is printed once, in its column, whatever the order of tokens."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from flora_train.commands.chat_display import BETWEEN, Answer, Columns, Sequential, make_display

WORDS = st.lists(
    st.sampled_from(["a", "bb", "longer", "x" * 45, "日本", "é", "\n", "\n\n", "\t"]), max_size=30
)
ESCAPES = re.compile(r"\x1b\[[\d;?]*[a-zA-Z]")


def terminal(width: int = 100, height: int = 12) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, highlight=False)


class Printed(Columns):
    """Keeps the rows that are printed for good."""

    def _print(self, row: Text) -> None:
        self.__dict__.setdefault("rows", []).append(row.plain)
        super()._print(row)


@given(left=WORDS, right=WORDS, order=st.lists(st.booleans(), max_size=40))
def test_rows_that_are_printed_are_those_of_the_whole_texts(
    left: list[str], right: list[str], order: list[bool]
) -> None:
    console = terminal()
    display = Printed(console, ["base", "one"], 40)
    texts = [" ".join(left), " ".join(right)]
    shown = [0, 0]
    for second in order:
        shown[second] += 7
        answers = (Answer(text[:size]) for text, size in zip(texts, shown, strict=True))
        display.update(dict(zip(["base", "one"], answers, strict=True)))
    display.update({name: Answer(text, True) for name, text in zip(["base", "one"], texts, strict=True)})
    display.close()
    rows = display.__dict__["rows"][1:]
    cells = [row.split(BETWEEN) for row in rows]
    columns = [[line.rstrip() for line in column] for column in zip(*cells, strict=True)]
    for text, column in zip(texts, columns or [[], []], strict=True):
        whole = Text(text.strip("\n"), tab_size=4).wrap(terminal(), 40)
        expected = [line.plain.rstrip() for line in whole]
        assert column[: len(expected)] == expected
        assert not any(column[len(expected) :])
        assert all(cell_len(line) <= 40 for line in column)


def test_what_may_still_change_is_redrawn_and_not_printed() -> None:
    display = Printed(terminal(), ["base", "one"], 40)
    display.update({"base": Answer("a finished line\nand a wor"), "one": Answer("b")})
    assert len(display.__dict__["rows"]) == 1  # the heading: the second column has no line that is final
    display.update({"base": Answer("a finished line\nand a wor"), "one": Answer("b\nc")})
    assert display.__dict__["rows"][1:] == [f"{'a finished line':40}{BETWEEN}b"]
    display.close()


def test_one_after_the_other_prints_every_text_once() -> None:
    console = Console(file=io.StringIO(), width=60)
    display = Sequential(console, ["base", "one"])
    display.update({"base": Answer("a"), "one": Answer("x y")})
    display.update({"base": Answer("a b"), "one": Answer("x y z", ended=True)})
    display.update({"base": Answer("a b\x1b[31m", ended=True), "one": Answer("x y z", ended=True)})
    display.close()
    assert console.file.getvalue() == "[base]\na b\\x1b[31m\n\n[one]\nx y z\n\n"


@pytest.mark.parametrize(
    ("width", "names", "kind"),
    [(100, 3, Columns), (100, 4, Sequential), (60, 2, Sequential), (64, 2, Columns), (100, 1, Sequential)],
)
def test_columns_are_for_wide_terminals(width: int, names: int, kind: type) -> None:
    display = make_display(terminal(width), [f"n{i}" for i in range(names)])
    assert type(display) is kind
    display.close()
    assert type(make_display(Console(file=io.StringIO(), width=200), ["base", "one"])) is Sequential
