"""The command line. Each command's arguments are in a module of this package, its work in `commands`."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

from flora_train.config.errors import UserError, user_error
from flora_train.config.terminal_text import plain, safe_streams, write_failure
from flora_train.runtime.logging import init_logging, stop_logging
from flora_train.runtime.signals import SAVED, STOPPED, Interrupted, stop_on_interrupt

# torch's threads wait for each other by spinning, which starves other processes on the same cores: another
# process, or the threads that compute adapters (kernels/cpu_threads.py). It is read when torch loads, which
# is after this module.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory: a step allocates the same sizes again and again, and pages returned to the
    system come back zeroed, page by page."""
    if sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


_keep_freed_memory()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (default: of the process's own arguments).

    Returns the exit status: 0, 2 after an error that the user can correct, 75 (SAVED) where a run was asked
    to stop (SIGTERM, SIGINT) and can be resumed, or 130 (STOPPED) after Ctrl-C elsewhere.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with safe_streams():
        try:
            init_logging()
            with stop_on_interrupt():
                status = _run(argv)
                if sys.stdout is not None:  # closed by the caller (>&-)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                print("interrupted: files that were written are complete", file=sys.stderr)
            return STOPPED
        finally:
            stop_logging()
        if (failure := write_failure()) is not None:
            return _fail(user_error("standard output", None, f"could not be written ({failure.strerror})"))
    return status


def _run(argv: Sequence[str]) -> int:
    from flora_train.cli.app import run_command

    try:
        return run_command(argv)
    except UserError as error:
        return _fail(error)
    except OSError as error:  # of the system, where no other code names the setting
        place = error.filename or " ".join(argv[:1])
        return _fail(
            user_error(
                str(place),
                None,
                f"{error.strerror or error}: correct that, or choose another place, and run again",
            )
        )
    except Interrupted as pause:
        if os.environ.get("RANK", "0") == "0":
            print(str(pause), file=sys.stderr)
        return SAVED


def _fail(error: UserError) -> int:
    """Print the problems of an error, once per machine and not per process."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for problem in error.problems:
            print(f"error: {plain(problem)}", file=sys.stderr)
        if error.advice is not None:
            print(plain(error.advice), file=sys.stderr)
    return 2
