"""Log lines for people: one handler on standard error, for the main process only."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from flora_train.config.terminal_text import plain
from flora_train.runtime.hub_retries import hide_retries, show_retries

if TYPE_CHECKING:
    from rich.console import Console

LIBRARY = "flora_train"
"""Parent of every logger of the package; it has a NullHandler, so that the package prints nothing by
itself."""


def init_logging(level: int | str = logging.INFO) -> None:
    """Print the package's log lines on standard error, as the command line does. A second call replaces the
    first.

    Lines have no timestamp and no level, and warnings begin with `note: `. The hub's client prints a line for
    every retry; one line a minute replaces them. For other formats, files or
    filters, configure the logger `flora_train` with the standard library instead of calling this.

    Args:
        level: The lowest level that is printed, for instance `logging.WARNING` or `"WARNING"` for notes only.
    """
    stop_logging()
    logger = logging.getLogger(LIBRARY)
    logger.addHandler(ConsoleHandler())
    logger.setLevel(level)
    logger.propagate = (
        False  # some notebooks give the root logger a handler, which would print each line again
    )
    hide_retries()


def stop_logging() -> None:
    """Undo `init_logging`: the package is silent again."""
    logger = logging.getLogger(LIBRARY)
    for handler in [handler for handler in logger.handlers if isinstance(handler, ConsoleHandler)]:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
        show_retries()


class MainProcessFilter(logging.Filter):
    """Passes the records of the main process of a run; the other processes log the same lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank() == 0
        return os.environ.get("RANK", "0") == "0"


class LineFormatter(logging.Formatter):
    """The message alone, `note: ` before a warning, `error: ` before an error; control characters are written
    as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{self.prefix(record)}{plain(super().format(record))}"

    @staticmethod
    def prefix(record: logging.LogRecord) -> str:
        if record.levelno >= logging.ERROR:
            return "error: "
        return "note: " if record.levelno >= logging.WARNING else ""


class ConsoleHandler(logging.Handler):
    """Prints records through rich on a terminal, above a progress bar if there is one, and as plain lines
    elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(MainProcessFilter())
        self.setFormatter(LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if not is_terminal():
                print(line, file=sys.stderr, flush=True)
                return
            from rich.text import Text

            text = Text(line)
            text.stylize("bold", 0, len(LineFormatter.prefix(record)))
            error_console().print(text, soft_wrap=True)
        except Exception:
            self.handleError(record)


def may_draw_progress(console: Console) -> bool:
    """Whether a progress bar is drawn: on a terminal or in a notebook, unless the package's log level is
    above INFO."""
    silenced = logging.getLogger(LIBRARY).level > logging.INFO or logging.root.manager.disable >= logging.INFO
    return not silenced and (is_terminal() or console.is_jupyter)


def is_terminal() -> bool:
    """Whether standard error is a terminal, also while a progress bar wraps it."""
    stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    return stream is not None and stream.isatty()


_console: Console | None = None


def error_console() -> Console:
    """The console of standard error, which log lines and the progress bar share, so that lines are printed
    above the bar."""
    from rich.console import Console

    global _console
    if _console is None:
        _console = Console(stderr=True)
    return _console
