"""Runs one command within limits.

Its output is drained so that it never blocks; start and end of it are kept.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import IO

from flora_train.evaluation.code.programs.memory_limit import SandboxMemory, SessionMemory

KEPT_BYTES = 64 << 10
"""Bytes kept of each end of the output; the results of tests are printed last."""
CHUNK = 1 << 16
PIPE_BYTES = 1 << 20
"""The largest size that Linux allows every user.

Node does not wait when a pipe is full, and drops what does not fit, even the error that ended the program.
"""
INFO = "descriptor:info"
"""Placeholder in a command for the file descriptor on which bubblewrap reports its process id."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command and its limits."""

    argv: Sequence[str]
    """Program and arguments."""
    folder: Path
    """The current directory."""
    environment: Mapping[str, str]
    """The whole environment; nothing is inherited."""
    memory: int
    """Bytes that all processes of the command may hold together."""
    scratch: int = 0
    """Bytes of each scratch folder of the sandbox."""
    data: Mapping[str, bytes] = field(default_factory=dict)
    """Word -> content; the word is replaced by the number of a file descriptor with this content."""
    stdin: str | None = None
    """Standard input; None: empty."""
    stop: Event = field(default_factory=Event)
    """Once set, the command is ended as by a timeout."""


@dataclass(frozen=True)
class Ended:
    """The result of a command."""

    status: int
    """Exit status as the shell counts: 128 + n for signal n."""
    output: str
    errors: str
    wall: float
    """Elapsed seconds."""
    timed_out: bool
    cpu: float = 0.0
    """CPU seconds of the child process that computed longest (without a sandbox: of all processes together).
    """
    over_memory: bool = False
    """Whether it was stopped because its processes together held too much memory."""


def run_command(command: Command, wall: float) -> Ended:
    """Run a command to its end, at most `wall` seconds. All processes that it started end with it."""
    started = time.monotonic()
    with ExitStack() as opened:
        process, memory = _start(command, opened)
        captured: dict[str, tuple[bytes, bytes]] = {}
        threads = [Thread(target=_drain, args=(process.stdout, captured, "out"), daemon=True)]
        threads.append(Thread(target=_drain, args=(process.stderr, captured, "err"), daemon=True))
        if command.stdin is not None:
            threads.append(Thread(target=_feed, args=(process.stdin, command.stdin.encode()), daemon=True))
        for thread in threads:
            thread.start()
        timed_out, over_memory = False, False
        try:
            timed_out, over_memory = _wait(process.pid, started + wall, memory, stop=command.stop)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    for thread in threads:
        thread.join(timeout=5)
    output, errors = (
        b"".join(captured.get(name, ())).decode("utf-8", errors="replace") for name in ("out", "err")
    )
    status = process.returncode
    if status < 0:
        status = 128 - status
    cpu = memory.computed(usage.ru_utime + usage.ru_stime)
    return Ended(status, output, errors, time.monotonic() - started, timed_out, cpu, over_memory)


def _start(
    command: Command, opened: ExitStack
) -> tuple[subprocess.Popen[bytes], SandboxMemory | SessionMemory]:
    descriptors = {word: opened.enter_context(_readable(content)) for word, content in command.data.items()}
    info = None
    if INFO in command.argv:
        info, descriptors[INFO] = opened.enter_context(_pipe())
    process = subprocess.Popen(
        [str(descriptors.get(word, word)) for word in command.argv],
        cwd=command.folder,
        env=command.environment,
        stdin=subprocess.DEVNULL if command.stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        pass_fds=tuple(descriptors.values()),
    )
    import fcntl  # missing on Windows, where the rest of a run works

    for stream in (process.stdout, process.stderr):
        with suppress(OSError, AttributeError):  # macOS has no F_SETPIPE_SZ
            fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # type: ignore[arg-type]
    if info is None:
        return process, SessionMemory(process.pid, command.memory)
    return process, SandboxMemory(info, command.memory, command.scratch)


def _wait(
    pid: int, deadline: float, memory: SandboxMemory | SessionMemory, *, stop: Event
) -> tuple[bool, bool]:
    """Wait until the process has ended, or must be stopped: (by deadline or `stop`, because of its memory).

    The process is not reaped here.
    """
    with _end_of(pid) as ended:
        pause = memory.tick
        while not ended(max(0.0, min(pause, deadline - time.monotonic()))):
            if time.monotonic() >= deadline or stop.is_set():
                return True, False
            began = time.thread_time()  # CPU time: on a busy machine a check takes longer, but costs no more
            if memory.exceeded():
                return False, True
            pause = max(memory.tick, 5 * (time.thread_time() - began))
    return False, False


@contextmanager
def _end_of(pid: int) -> Iterator[Callable[[float], bool]]:
    """A function that waits at most the given seconds and returns whether the process has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):  # an old kernel

        def wait(seconds: float) -> bool:
            until = time.monotonic() + seconds
            while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if time.monotonic() >= until:
                    return False
                time.sleep(min(0.01, seconds))
            return True

        yield wait
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        yield lambda seconds: bool(poll.poll(seconds * 1000))
    finally:
        os.close(descriptor)


@contextmanager
def _readable(content: bytes) -> Iterator[int]:
    descriptor = os.memfd_create("data")
    try:
        os.write(descriptor, content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def _feed(stream: IO[bytes] | None, content: bytes) -> None:
    assert stream is not None
    with suppress(OSError), stream:  # the process may end before reading everything
        stream.write(content)


def _drain(stream: IO[bytes] | None, captured: dict[str, tuple[bytes, bytes]], name: str) -> None:
    assert stream is not None
    start, end = b"", b""
    with stream, suppress(OSError, ValueError):
        while chunk := stream.read1(CHUNK):  # type: ignore[attr-defined]
            room = KEPT_BYTES - len(start)
            start += chunk[:room]
            end = (end + chunk[room:])[-KEPT_BYTES:]
            captured[name] = (start, end)
