"""How is one command run within limits? Its output is drained, so that nobody waits for a reader, and its two ends are kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

KEPT_BYTES = 64 << 10
"""Of either end: what a program says of its tests comes last."""
CHUNK = 1 << 16
PIPE_BYTES = 1 << 20
"""What Linux grants anyone. Node writes to its pipes without waiting and drops what does not fit, the error that ended it too."""


@dataclass(frozen=True)
class Ended:
    """status: as the shell counts, 128 + n for signal n; wall: seconds on the clock; timed_out: stopped by it."""

    status: int
    output: str
    errors: str
    wall: float
    timed_out: bool


def run_command(words: Sequence[str], folder: Path, wall: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run it to its end, or to `wall` seconds; whatever it started ends with it."""
    started = time.monotonic()
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    import fcntl  # Linux and macOS only, as all of this: what else a run does is done on Windows, too

    for stream in (process.stdout, process.stderr):
        with suppress(OSError, AttributeError):  # macOS has no F_SETPIPE_SZ
            fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # type: ignore[arg-type]
    kept: dict[str, tuple[bytes, bytes]] = {}
    readers = [Thread(target=_drain, args=(process.stdout, kept, "out"), daemon=True)]
    readers += [Thread(target=_drain, args=(process.stderr, kept, "err"), daemon=True)]
    for reader in readers:
        reader.start()
    timed_out = False
    try:
        process.wait(timeout=wall)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:  # also after Ctrl-C
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    for reader in readers:
        reader.join(timeout=5)
    output, errors = (b"".join(kept.get(name, ())).decode("utf-8", errors="replace") for name in ("out", "err"))
    return Ended(128 - status if status < 0 else status, output, errors, time.monotonic() - started, timed_out)


def _drain(stream: IO[bytes] | None, kept: dict[str, tuple[bytes, bytes]], name: str) -> None:
    assert stream is not None
    begun, ended = b"", b""
    with stream, suppress(OSError, ValueError):
        while chunk := stream.read1(CHUNK):  # type: ignore[attr-defined]
            room = KEPT_BYTES - len(begun)
            begun += chunk[:room]
            ended = (ended + chunk[room:])[-KEPT_BYTES:]
            kept[name] = (begun, ended)
