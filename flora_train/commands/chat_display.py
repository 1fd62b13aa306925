"""Answers of several contenders while they are generated: in columns, or one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from flora_train.config.terminal_text import plain

NARROWEST = 30
"""Characters of the narrowest column; with less for each, answers are shown one after the other."""
BETWEEN = " \u2502 "
"""Between two columns."""
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
"""Of the adapters' names; the base has none."""


@dataclass(frozen=True)
class Answer:
    """The text of one contender so far."""

    text: str = ""
    ended: bool = False


class Display(Protocol):
    """Shows the answers to one text."""

    def update(self, answers: Mapping[str, Answer]) -> None:
        """Show the answers so far, by contender."""
        ...

    def close(self) -> None:
        """Show everything that is left."""
        ...


def make_display(console: Console, names: Sequence[str]) -> Display:
    """The display for these contenders: columns at a terminal that is wide enough."""
    width = (console.width - len(BETWEEN) * (len(names) - 1)) // len(names)
    in_place = console.is_terminal and not console.is_dumb_terminal
    if in_place and len(names) > 1 and width >= NARROWEST:
        return Columns(console, names, width)
    return Sequential(console, names)


class Sequential:
    """One contender after the other: the first is shown while it is generated, the next from where it has
    arrived by then."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console, self.names = console, names
        self._position = 0
        """The contender that is shown now."""
        self._shown: str | None = None
        """Its text that is shown; None before its heading is."""

    def update(self, answers: Mapping[str, Answer]) -> None:
        while self._position < len(self.names):
            name = self.names[self._position]
            answer = answers[name]
            if self._shown is None:
                heading = plain(f"[{name}]", keep="")
                self.console.print(Text(heading, style=_style(self.names, name)))
                self._shown = ""
            self._write(answer.text)
            if not answer.ended:
                return
            self.console.file.write("\n\n")
            self._position, self._shown = self._position + 1, None
        self.console.file.flush()

    def close(self) -> None:
        if self._shown is not None:
            self.console.file.write("\n")
        self.console.file.flush()

    def _write(self, text: str) -> None:
        shown = self._shown or ""
        if text.startswith(shown):
            self.console.file.write(plain(text[len(shown) :]))
            self.console.file.flush()
            self._shown = text


class Columns:
    """Side by side. Rows that cannot change any more are printed for good, those below are redrawn."""

    def __init__(self, console: Console, names: Sequence[str], width: int) -> None:
        self.console, self.names, self.width = console, names, width
        self._printed = 0
        self._answers: Mapping[str, Answer] = {name: Answer() for name in names}
        headings = [Text(plain(name, keep=""), style=_style(names, name), end="") for name in names]
        for heading in headings:
            heading.truncate(width, overflow="ellipsis")
        self._print(self._row(headings))
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._live.start()

    def update(self, answers: Mapping[str, Answer]) -> None:
        self._answers = answers
        lines = [_wrapped(self.console, answers[name].text, self.width) for name in self.names]
        ended = [answers[name].ended for name in self.names]
        final = min(_final_lines(*column) for column in zip(lines, ended, strict=True))
        height = max(map(len, lines))
        final = min(final, height)
        for row in range(self._printed, final):
            self._print(self._row(_cells(lines, row)))
        self._printed = max(self._printed, final)
        open_rows = [self._row(_cells(lines, row)) for row in range(self._printed, height)]
        visible = open_rows[-max(1, self.console.height - 2) :]
        self._live.update(Text("\n").join(visible), refresh=True)

    def close(self) -> None:
        self.update({name: Answer(answer.text, ended=True) for name, answer in self._answers.items()})
        self._live.stop()
        self.console.print()

    def _print(self, row: Text) -> None:
        self.console.print(row, no_wrap=True, crop=False, overflow="ignore")

    def _row(self, cells: Sequence[Text]) -> Text:
        row = Text()
        for position, cell in enumerate(cells):
            if position:
                row.append(BETWEEN, style="dim")
            row.append_text(cell)
            if position < len(cells) - 1:
                row.append(" " * (self.width - cell_len(cell.plain)))
        return row


def _wrapped(console: Console, text: str, width: int) -> list[Text]:
    """The lines of a text in a column."""
    shown = Text(plain(text.strip("\n")), tab_size=4)
    return list(shown.wrap(console, width))


def _final_lines(lines: Sequence[Text], ended: bool) -> int:
    """Lines that cannot change any more: the last word of an answer may still grow into the next line."""
    return 1_000_000 if ended else len(lines) - 1


def _cells(columns: Sequence[Sequence[Text]], row: int) -> list[Text]:
    return [column[row] if row < len(column) else Text() for column in columns]


def _style(names: Sequence[str], name: str) -> str:
    """Of a contender's name."""
    if name == "base":
        return "bold"
    adapters = [other for other in names if other != "base"]
    return f"bold {COLOURS[adapters.index(name) % len(COLOURS)]}"
