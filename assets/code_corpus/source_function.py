"""The function that the extraction of every language returns."""

from __future__ import annotations

import re
from dataclasses import dataclass

# how Lua, Perl and Ruby define a function; other languages have patterns of their own
KEYWORD_DEFINITION = re.compile(r"\b(?:function|def|sub)\s+(?:[\w.:]*[.:])?(\w+)")


@dataclass(frozen=True)
class SourceFunction:
    """One function cut out of a file, indented as if it stood at the top level."""

    name: str
    """Without module, class or receiver: `split` for `M.split` and `self.split`."""

    comment: str
    """The comment lines directly above, without a trailing newline; empty when there are none."""

    signature: str
    """The line that opens the function."""

    body: str
    """The lines between signature and closing line."""

    closing: str
    """The closing line: `end` or `}`."""

    member: bool = False
    """Whether it may use the names of a class around it without saying so."""

    @property
    def prompt(self) -> str:
        """Comment and signature; no newline at the end, since small models fail after one."""
        return f"{self.comment}\n{self.signature}" if self.comment else self.signature

    @property
    def completion(self) -> str:
        """Everything after the prompt."""
        return f"\n{self.body}\n{self.closing}"


class BlockCommented(SourceFunction):
    """A function whose comment is shown as a block, as D's documentation mostly is."""

    @property
    def prompt(self) -> str:
        """Comment block and signature."""
        if not self.comment:
            return self.signature
        text = "\n".join(line.removeprefix("//").removeprefix(" ") for line in self.comment.split("\n"))
        return f"/**\n{text}\n*/\n{self.signature}"


class Documented(SourceFunction):
    """A function whose comment stands below its signature, as Python's docstrings do."""

    @property
    def prompt(self) -> str:
        """Signature and docstring."""
        if not self.comment:
            return self.signature
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in self.comment.split("\n"))
        return f'{self.signature}\n    """' + text.replace("\n", "\n    ").replace("    \n", "\n") + '"""'


def indentation(line: str) -> int:
    """Columns of white space in front, tabs to multiples of eight."""
    expanded = line.expandtabs(8)
    return len(expanded) - len(expanded.lstrip(" "))


def dedent(lines: list[str], margin: str) -> list[str] | None:
    """Remove `margin` from every line that is not blank; None when one does not start with it."""
    if any(line.strip() and not line.startswith(margin) for line in lines):
        return None
    return [line[len(margin) :] if line.strip() else "" for line in lines]


def comment_above(lines: list[str], start: int, marker: str) -> list[str]:
    """The block of whole-line comments that ends directly above line `start`, stripped of indentation."""
    first = start
    while first > 0 and lines[first - 1].lstrip().startswith(marker):
        first -= 1
    return [line.strip() for line in lines[first:start]]
