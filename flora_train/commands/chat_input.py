"""What the user of `flora-train chat` types: texts of one or several lines, and commands."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec

from flora_train.config.errors import did_you_mean, user_error
from flora_train.config.terminal_text import plain

PROMPT, CONTINUED = "you> ", "...> "
BLOCK = '"""'
"""Begins and ends a text of several lines."""
COMMANDS = {
    "/adapter": "lists the adapters",
    "/adapter NAME ...": "lets these answer, beside the base",
    "/adapter base": "lets the base alone answer",
    "/reset": "forgets the conversation",
    "/help": "prints this list",
    "/quit": "leaves, as Ctrl-D does",
}
"""Form of a command -> what it does."""


@dataclass(frozen=True)
class Command:
    """A command and its arguments."""

    name: str
    """Without the slash."""
    arguments: tuple[str, ...]


class UserInput:
    """Reads standard input: with line editing at a terminal, otherwise line by line, and shown again."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self.interactive and find_spec("readline") is not None:
            import readline  # noqa: F401 - input() then has line editing and a history

    def read(self) -> str | Command | None:
        """The next text or command; None at the end. Raises UserError for an unknown command."""
        text: str | None = ""
        while text == "":
            text = self._text()
        if text is None:
            return None
        if not text.startswith("/") or text.startswith("//"):
            return text.removeprefix("/")
        name, *arguments = text.split()
        known = list(dict.fromkeys(form.split()[0] for form in COMMANDS))
        if name not in known:
            hint = f"there are {', '.join(known)}.{did_you_mean(name, known)}"
            raise user_error(name, None, f"{hint} A text that begins with / is written with two")
        return Command(name.removeprefix("/"), tuple(arguments))

    def _text(self) -> str | None:
        """A line that is not empty, or the lines between two BLOCKs; None at the end."""
        while True:
            line = self._line(PROMPT)
            if line is None:
                return None
            if line.strip():
                break
        text = line.strip()
        if not text.startswith(BLOCK):
            return text
        text = text.removeprefix(BLOCK)
        while not text.rstrip().endswith(BLOCK):
            line = self._line(CONTINUED)
            if line is None:
                break
            text += f"\n{line}"
        return text.rstrip().removesuffix(BLOCK).strip("\n")

    def _line(self, prompt: str) -> str | None:
        if self.interactive:
            try:
                return _without_surrogates(input(prompt))
            except EOFError:
                print()
                return None
        line = sys.stdin.readline()
        if not line:
            return None
        line = _without_surrogates(line.rstrip("\r\n"))
        print(f"{prompt}{plain(line)}", flush=True)
        return line


def _without_surrogates(text: str) -> str:
    """A text whose bytes that are not UTF-8, which Python reads as lone surrogates, are replaced: tokenizers
    reject them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
