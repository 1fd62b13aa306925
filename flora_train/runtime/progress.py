"""What does a person watching the run see? A bar with ETA and loss per method; plain lines where there is no terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from flora_train.config.terminal_text import plain
from flora_train.runtime.distributed import is_main_process
from flora_train.runtime.logging import error_console, may_draw_progress

logger = logging.getLogger(__name__)


class ProgressBar:
    """Progress over `total` units of one stage, for instance steps. Silent in all but the main process.

    begun: units that an earlier sitting did; line_every: seconds between two plain lines, where there is no terminal.
    """

    def __init__(self, stage: str, total: float, begun: float = 0.0, line_every: float = 30.0) -> None:
        self.stage, self.total, self.begun, self.line_every = plain(stage, keep=""), total, begun, line_every
        self.started = time.monotonic()
        self._last_line = -float("inf")
        self._bar: Progress | None = None
        self.silent = not is_main_process()
        console = error_console()
        if not self.silent and may_draw_progress(console):
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=console,
            )
            self._task: Any = self._bar.add_task(self.stage, total=total, detail="")
            self._bar.start()

    def update(self, done: float, facts: Mapping[str, str] | None = None, force_line: bool = False) -> None:
        """done: units so far; facts: short words for the line; force_line: print a plain line now."""
        if self.silent:
            return
        detail = f"{_percent(done / self.total)} {self._eta(done)}  " + "  ".join(
            plain(f"{key} {value}", keep="") for key, value in (facts or {}).items()
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, detail=detail.strip())
        elif force_line or time.monotonic() - self._last_line > self.line_every:
            self._last_line = time.monotonic()
            logger.info(f"{self.stage}: {detail.strip()}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Since it began; never 0."""
        return max(time.monotonic() - self.started, 1e-9)

    def _eta(self, done: float) -> str:
        seconds = self.seconds
        ours = done - self.begun
        return f"{duration(seconds)} < {duration(seconds * (self.total - done) / ours)}" if ours else ""


def share_and_eta(share: float, started: float) -> str:
    """`28% < 2m05s`. started: time.monotonic() when it began."""
    return f"{share:.0%} < {duration((time.monotonic() - started) * (1 / share - 1))}" if share else "0%"


def duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _percent(share: float) -> str:
    return f"{100 * share:3.0f}%"
