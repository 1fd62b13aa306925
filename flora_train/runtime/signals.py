"""What happens when a run is told to end? The step is finished and saved, on all processes alike; told again, it ends at once."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SAVED = 75
"""Exit status of a run that was told to end, saved its state and can go on (EX_TEMPFAIL of sysexits.h)."""

STOPPED = 130
"""Exit status after Ctrl-C where nothing is saved to go on from: as a shell counts, 128 + 2."""

SAME = 2.0
"""Seconds within which signals are one: a scheduler tells every process, and a launcher tells its own again."""


class Interrupted(Exception):
    """The run was told to end, and is saved after `step` steps."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"told to end: saved after step {step}; resume=true goes on from there")


class StopSignals:
    """A context in which SIGTERM and SIGINT are noted (`stop_requested`) instead of ending the process. A second one, `same` seconds after the
    first or later, does what it does without us: checkpoints are whole or not there, so the last good one is left."""

    def __init__(self, same: float = SAME) -> None:
        self.stop_requested = False
        self.same = same
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # signals are Python's main thread's business
            self._before = {
                number: signal.signal(number, self._noted) for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _noted(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.stop_requested:
            self.stop_requested, self._first = True, now
            name = signal.Signals(number).name
            logger.info(f"{name}: the step is finished and saved first; a second one ends at once")
        elif now - self._first >= self.same:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def stop_on_interrupt() -> Iterator[None]:
    """A context in which the first Ctrl-C raises KeyboardInterrupt out of it, whatever a library makes of it on the way (some turn it into
    an error of their own), and a second one ends the process at once, without a traceback."""
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    except BaseException as error:
        if asked and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def end_with_launcher() -> None:
    """Be told to end (SIGTERM) when the launcher that started this process is gone, whatever ended it: else it would train on alone, and
    beside whatever is started next. On Linux, below accelerate or torchrun."""
    launched = {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" and launched else None
    if prctl is not None:
        set_parent_death_signal = 1
        prctl(set_parent_death_signal, int(signal.SIGTERM))
