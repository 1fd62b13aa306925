"""Text for terminals: control characters are escaped, and a closed pipe or full disk does not end a
command."""

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
    "\u202a-\u202e\u2066-\u2069"  # change the order in which the following text is shown
    "\ufeff\ufff9-\ufffb"
    "\ud800-\udfff"  # half of a surrogate pair, which cannot be encoded
    "\U000e0000-\U000e007f"  # invisible letters
)


def plain(text: object, keep: str = "\n\t") -> str:
    """`text` with every character that controls a terminal or cannot be shown as an escape: `\\x1b`,
    `\\u202e`.

    keep: characters that stay as they are; "" for a name within a line.
    """

    def replacement(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else _escape(match[0])

    return re.sub(f"[{HARMFUL}]", replacement, str(text))


def shown(text: object, style: str = "", keep: str = "\n\t") -> Text:
    """`plain` text for a rich console, without markup."""
    from rich.text import Text

    return Text(plain(text, keep), style=style)


def in_cell(text: object, style: str = "") -> Text:
    """`shown` in one line, for a table cell."""
    return shown(text, style, keep="")


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table in full width: rich would truncate names and numbers to the width of the terminal."""
    from rich.console import Console

    console = console or Console(soft_wrap=True)
    table_width = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    before, console.width = console.width, max(console.width, table_width)
    console.print(table)
    console.width = before


WIDEST = 10_000
"""Characters of the widest table."""


def print_plain(*lines: object) -> None:
    """Print lines on standard output as `plain` text."""
    for line in lines:
        print(plain(line))


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\U{code:08x}"


class PatientStream:
    """A standard stream that keeps a command running after its reader has left or the disk is full.

    After the first failed write, output is discarded and the command continues to its own exit status.
    `failed` is the error of that write, unless it was a closed pipe.
    """

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
            self._stream.flush()  # as reconfigure does
        self._stream.reconfigure(**options)

    @contextmanager
    def _patiently(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EINVAL):  # Windows raises EINVAL for a closed pipe
                self.failed = self.failed or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # buffered text is discarded as well at the end
            os.close(nowhere)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Standard output and error escape characters that they cannot encode, and are PatientStreams.

    The streams are restored afterwards. Streams that a host program has installed stay in place.
    """
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
        with suppress(OSError, ValueError):  # some redirected streams cannot be reconfigured
            stream.reconfigure(errors=errors)


def write_failure() -> OSError | None:
    """The error of a failed write to standard output, None if there was none or the reader closed the
    pipe."""
    return getattr(sys.stdout, "failed", None)
