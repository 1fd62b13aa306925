"""Signals: SIGTERM and SIGINT finish and save the training step; a second one ends the process at once."""

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
"""Exit status of a run that was stopped by a signal and can be resumed (EX_TEMPFAIL of sysexits.h)."""

STOPPED = 130
"""Exit status after Ctrl-C where there is nothing to resume: 128 + SIGINT, as in a shell."""

SAME = 2.0
"""Seconds within which signals count as one: schedulers signal every process, and launchers signal theirs
again.
"""


class Interrupted(Exception):
    """A signal stopped the run, which is saved after `step` steps (or rounds: `unit`)."""

    def __init__(self, step: int, unit: str = "step") -> None:
        self.step = step
        super().__init__(f"stopped by a signal: saved after {unit} {step}; resume=true continues from there")


class StopSignals:
    """A context in which SIGTERM and SIGINT set `stop_requested` instead of ending the process.

    A second signal, at least `same` seconds after the first, has its default effect: checkpoints are written
    atomically, so that the last good one remains.
    """

    def __init__(self, same: float = SAME) -> None:
        self.stop_requested = False
        self.same = same
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python handles signals in its main thread only
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        # after a first signal the launcher's own may still follow, while the run ends
        if not self.stop_requested:
            self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.stop_requested:
            self.stop_requested, self._first = True, now
            name = signal.Signals(number).name
            logger.info(f"{name}: finishing and saving the step; a second signal ends the run at once")
        elif now - self._first >= self.same:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def stop_on_interrupt() -> Iterator[None]:
    """A context in which the first Ctrl-C raises KeyboardInterrupt, also where a library turns it into an
    error of its own, and a second one ends the process at once, without a traceback.
    """
    interrupted = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    handles = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if handles:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    except BaseException as error:
        if interrupted and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        if handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def end_with_launcher() -> None:
    """Receive SIGTERM when the launcher that started this process ends, for whatever reason; otherwise this
    process would keep training, beside the next run. On Linux, below accelerate or torchrun.
    """
    launched = {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" and launched else None
    if prctl is not None:
        set_parent_death_signal = 1
        prctl(set_parent_death_signal, int(signal.SIGTERM))
