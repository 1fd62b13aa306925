"""Progress of one stage: a bar on a terminal, an updated line in a notebook, plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from flora_train.config.terminal_text import plain
from flora_train.runtime.distributed import is_main_process
from flora_train.runtime.logging import error_console, may_draw_progress

logger = logging.getLogger(__name__)


class Display(Protocol):
    """Draws the progress of one stage in place."""

    def update(self, done: float, detail: str) -> None: ...

    def close(self) -> None: ...


class ProgressBar:
    """Progress over `total` units of one stage, for instance steps (None: as many as there are). Silent in
    all but the main process."""

    def __init__(
        self, stage: str, total: float | None, begun: float = 0.0, *, line_every: float = 30.0
    ) -> None:
        self.stage, self.total = plain(stage, keep=""), total
        self.begun = begun
        """Units that were done before this sitting."""
        self.line_every = line_every
        """Seconds between two log lines, where no display is drawn."""
        self.started = time.monotonic()
        self._last_line = -float("inf")
        self.silent = not is_main_process()
        self._display = None if self.silent else make_display(self.stage, total)

    def update(self, done: float, facts: Mapping[str, str] | None = None, force_line: bool = False) -> None:
        """done: units so far; facts: short texts for the line; force_line: write a log line now."""
        if self.silent:
            return
        share = ""
        if self.total is not None:
            share = f"{100 * done / self.total:3.0f}%"
        parts = [share, self._times(done)]
        parts += [plain(f"{key} {value}", keep="") for key, value in (facts or {}).items()]
        detail = "  ".join(filter(None, parts))
        if self._display is not None:
            self._display.update(done, detail)
        elif force_line or time.monotonic() - self._last_line > self.line_every:
            self._last_line = time.monotonic()
            logger.info(f"{self.stage}: {detail.strip()}")

    def close(self) -> None:
        if self._display is not None:
            self._display.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Seconds since the start; never 0."""
        return max(time.monotonic() - self.started, 1e-9)

    def _times(self, done: float) -> str:
        """`16s elapsed, 4m02s left`; empty before anything was done in this sitting."""
        seconds, done_now = self.seconds, done - self.begun
        if not done_now:
            return ""
        if self.total is None:
            return f"{duration(seconds)} elapsed"
        return f"{duration(seconds)} elapsed, {duration(seconds * (self.total - done) / done_now)} left"


def make_display(stage: str, total: float | None) -> Display | None:
    """What draws progress here; None where log lines are written instead."""
    console = error_console()
    if not may_draw_progress(console):
        return None
    if console.is_jupyter and find_spec("ipywidgets") is None:  # rich would draw nothing, and warn
        return NotebookLine(stage)
    return TerminalBar(stage, total, console)


class TerminalBar:
    """A bar of rich, on a terminal or in a notebook that has ipywidgets."""

    def __init__(self, stage: str, total: float | None, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
        )
        self._task = self._bar.add_task(stage, total=total, detail="")
        self._bar.start()

    def update(self, done: float, detail: str) -> None:
        self._bar.update(self._task, completed=done, detail=detail.strip())

    def close(self) -> None:
        self._bar.stop()


class NotebookLine:
    """A line of plain text in a notebook, which is replaced at most twice per second."""

    INTERVAL = 0.5

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._line = ""
        self._shown_at = -float("inf")
        self._handle: Any = None

    def update(self, done: float, detail: str) -> None:
        self._line = f"{self.stage}: {detail.strip()}"
        if time.monotonic() - self._shown_at >= self.INTERVAL:
            self._show()

    def close(self) -> None:
        if self._line:
            self._show()

    def _show(self) -> None:
        from IPython.display import display

        self._shown_at = time.monotonic()
        content = {"text/plain": self._line}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def share_and_time_left(share: float, started: float) -> str:
    """`28%, 2m05s left`. started: time.monotonic() at the start."""
    if not share:
        return "0%"
    return f"{share:.0%}, {duration((time.monotonic() - started) * (1 / share - 1))} left"


def duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
