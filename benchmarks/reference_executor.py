"""Runs a program as MultiPL-E's own harness does; written again from its behaviour, for a comparison.

There is no sandbox. The process is polled every 0.1 s, and each poll reads 1 KiB of its output from the pipe;
a time limit counts wall-clock seconds. C++ is compiled with plain `g++ -std=c++17`. Exit 0 is OK; every other
end is an Exception.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flora_train.evaluation.code.programs.execute import Program

LOOK_SECONDS = 0.1
LOOK_BYTES = 1024


def run_like_the_reference(program: Program) -> str:
    """OK, Exception, Timeout, or SyntaxError for a failed compilation."""
    language = program.language
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / language.file).write_text(program.source, encoding="utf-8")
        if (
            language.compile is not None
            and _exit_status(language.compile, language.file, folder, language.compile_seconds) != 0
        ):
            return "SyntaxError"
        status = _exit_status(language.run, language.file, folder, language.seconds)
        return "Timeout" if status is None else "OK" if status == 0 else "Exception"


def _exit_status(words: Sequence[str], file: str, folder: Path, seconds: float) -> int | None:
    """None: the time limit was exceeded."""
    pipe = subprocess.PIPE
    command = [word.replace("{file}", file) for word in words]
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        start_new_session=True,
        bufsize=0,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for stream in (process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
        status = None
        for _ in range(round(seconds / LOOK_SECONDS)):
            process.stdout.read(LOOK_BYTES)
            process.stderr.read(LOOK_BYTES)
            status = process.poll()
            if status is not None:
                break
            time.sleep(LOOK_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return status
