"""Run one command within limits. Its output is drained, so that it never waits for a reader, and both ends of it are kept."""

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
"""Of either end: what a program says of its tests comes last."""
CHUNK = 1 << 16
PIPE_BYTES = 1 << 20
"""What Linux grants anyone. Node writes to its pipes without waiting and drops what does not fit, the error that ended it too."""
INFO = "descriptor:info"
"""The word of a command that stands for the descriptor on which bubblewrap reports its process."""


@dataclass(frozen=True)
class Command:
    """words: what is started, in `folder`, with `environment` and nothing else of ours. data: word -> content; the word becomes the
    number of a descriptor that the content can be read from. stdin: what the command reads, by default nothing. memory: bytes that
    all its processes may hold together; scratch: bytes of each of the sandbox's scratch folders; stop: once it is set, the command is
    ended as by the clock."""

    words: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    memory: int
    scratch: int = 0
    data: Mapping[str, bytes] = field(default_factory=dict)
    stdin: str | None = None
    stop: Event = field(default_factory=Event)


@dataclass(frozen=True)
class Ended:
    """status: as the shell counts, 128 + n for signal n; wall: seconds on the clock; timed_out: stopped by it; cpu: seconds that a
    process which it started computed, the longest of them (without a sandbox: all together, itself included); over_memory: stopped because its processes together held too much."""

    status: int
    output: str
    errors: str
    wall: float
    timed_out: bool
    cpu: float = 0.0
    over_memory: bool = False


def run_command(command: Command, wall: float) -> Ended:
    """Run it to its end, or to `wall` seconds; whatever it started ends with it."""
    started = time.monotonic()
    with ExitStack() as opened:
        process, watch = _start(command, opened)
        kept: dict[str, tuple[bytes, bytes]] = {}
        helpers = [Thread(target=_drain, args=(process.stdout, kept, "out"), daemon=True)]
        helpers += [Thread(target=_drain, args=(process.stderr, kept, "err"), daemon=True)]
        if command.stdin is not None:
            helpers.append(Thread(target=_feed, args=(process.stdin, command.stdin.encode()), daemon=True))
        for helper in helpers:
            helper.start()
        timed_out, over_memory = False, False
        try:
            timed_out, over_memory = _wait(process.pid, started + wall, watch, command.stop)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    for helper in helpers:
        helper.join(timeout=5)
    output, errors = (b"".join(kept.get(name, ())).decode("utf-8", errors="replace") for name in ("out", "err"))
    code = process.returncode
    cpu = watch.computed(usage.ru_utime + usage.ru_stime)
    return Ended(128 - code if code < 0 else code, output, errors, time.monotonic() - started, timed_out, cpu, over_memory)


def _start(command: Command, opened: ExitStack) -> tuple[subprocess.Popen[bytes], SandboxMemory | SessionMemory]:
    descriptors = {word: opened.enter_context(_readable(content)) for word, content in command.data.items()}
    info = None
    if INFO in command.words:
        info, descriptors[INFO] = opened.enter_context(_pipe())
    process = subprocess.Popen(
        [str(descriptors.get(word, word)) for word in command.words],
        cwd=command.folder,
        env=command.environment,
        stdin=subprocess.DEVNULL if command.stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        pass_fds=tuple(descriptors.values()),
    )
    import fcntl  # Linux and macOS only, as all of this: what else a run does is done on Windows, too

    for stream in (process.stdout, process.stderr):
        with suppress(OSError, AttributeError):  # macOS has no F_SETPIPE_SZ
            fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # type: ignore[arg-type]
    if info is None:
        return process, SessionMemory(process.pid, command.memory)
    return process, SandboxMemory(info, command.memory, command.scratch)


def _wait(pid: int, deadline: float, watch: SandboxMemory | SessionMemory, stop: Event) -> tuple[bool, bool]:
    """Until the process has ended, which is then still to be reaped: whether the clock (or `stop`) stopped it, and whether its memory
    did."""
    with _end_of(pid) as ended:
        pause = watch.tick
        while not ended(max(0.0, min(pause, deadline - time.monotonic()))):
            if time.monotonic() >= deadline or stop.is_set():
                return True, False
            began = time.thread_time()  # on a busy machine a look takes longer, and costs no more
            if watch.exceeded():
                return False, True
            pause = max(watch.tick, 5 * (time.thread_time() - began))
    return False, False


@contextmanager
def _end_of(pid: int) -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds at most, and says whether the process has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):  # an old kernel

        def look(seconds: float) -> bool:
            until = time.monotonic() + seconds
            while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if time.monotonic() >= until:
                    return False
                time.sleep(min(0.01, seconds))
            return True

        yield look
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
    with suppress(OSError), stream:  # it may end without having read everything
        stream.write(content)


def _drain(stream: IO[bytes] | None, kept: dict[str, tuple[bytes, bytes]], name: str) -> None:
    assert stream is not None
    begun, ended = b"", b""
    with stream, suppress(OSError, ValueError):
        while chunk := stream.read1(CHUNK):  # type: ignore[attr-defined]
            room = KEPT_BYTES - len(begun)
            begun += chunk[:room]
            ended = (ended + chunk[room:])[-KEPT_BYTES:]
            kept[name] = (begun, ended)
