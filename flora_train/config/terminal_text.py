"""Text for a terminal: what is not ours is shown and never obeyed, and a stream that cannot take it does not
end a run."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

HARMFUL = (
    "\x00-\x1f\x7f-\x9f"  # control characters of ASCII and Latin-1: escape sequences begin with one
    "\u2028\u2029"  # other line ends
    "\u202a-\u202e\u2066-\u2069"  # these change the order in which what follows is shown
    "\ufeff\ufff9-\ufffb"
    "\ud800-\udfff"  # half a character, which no encoding takes
    "\U000e0000-\U000e007f"  # invisible letters
)


def plain(text: object, keep: str = "\n\t") -> str:
    """`text` with every character that a terminal might obey, or that could not be shown, written as an
    escape: `\\x1b`, `\\u202e`.

    keep: characters that stay as they are; "" for a name that stands in a line.
    """
    return re.sub(f"[{HARMFUL}]", lambda found: found[0] if found[0] in keep else _escape(found[0]), str(text))


def shown(text: object, style: str = "", keep: str = "\n\t") -> Text:
    """`plain` text for a rich console, which takes no markup from it."""
    from rich.text import Text

    return Text(plain(text, keep), style=style)


def in_cell(text: object, style: str = "") -> Text:
    """`shown` in one line, for a table."""
    return shown(text, style, keep="")


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table whole, its lines longer than the terminal's where they have to be: rich would cut names
    and figures instead."""
    from rich.console import Console

    console = console or Console(soft_wrap=True)
    wanted = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    before, console.width = console.width, max(console.width, wanted)
    console.print(table)
    console.width = before


WIDEST = 10_000


def print_plain(*lines: object) -> None:
    """Print lines on standard output, `plain`."""
    for line in lines:
        print(plain(line))


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class PatientStream:
    """A standard stream that outlives its reader: once a write finds the pipe closed (or the disk full), the
    rest goes nowhere, and the command goes on to its end and its own exit status. `failed` says what a write
    found, other than a closed pipe."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failed: OSError | None = None

    def write(self, text: str) -> int:
        with self._patiently():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._patiently():
            self._stream.flush()

    def reconfigure(self, **options: Any) -> None:
        with self._patiently():
            self._stream.flush()  # which reconfigure does, too
        self._stream.reconfigure(**options)

    @contextmanager
    def _patiently(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EINVAL):  # Windows says EINVAL of a closed pipe
                self.failed = self.failed or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is buffered goes there, too, when the process ends
            os.close(nowhere)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Standard output and error show what they cannot encode as escapes, and are patient (PatientStream).
    Afterwards they are what they were. Streams that a host program put in their place stay its own."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    errors = {name: getattr(stream, "errors", None) for name, stream in before.items()}
    for name, stream in before.items():
        _answer_errors(stream, "backslashreplace")
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, PatientStream(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            if isinstance(patient := getattr(sys, name), PatientStream) and patient is not stream:
                patient.flush()
                setattr(sys, name, stream)
            _answer_errors(stream, errors[name])


def _answer_errors(stream: Any, errors: str | None) -> None:
    if errors is not None and hasattr(stream, "reconfigure"):
        with suppress(OSError, ValueError):  # some that were redirected meanwhile do not take it, and stay as they are
            stream.reconfigure(errors=errors)


def write_failure() -> OSError | None:
    """Why standard output could not be written, if it was lost to something else than a reader who left."""
    return getattr(sys.stdout, "failed", None)
