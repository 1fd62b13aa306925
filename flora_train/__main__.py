"""python -m flora_train, and the flora-train command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def start(words: Sequence[str] | None = None) -> None:
    """Run the command line (default: the process's own) and end the process with its status. Ctrl-C while the first modules load, or
    while the process ends, is Ctrl-C, too: no traceback."""
    try:
        from flora_train.cli import main

        status = main(words)
    except KeyboardInterrupt:
        status = 130
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # the rest is Python's, which would show a traceback of an interrupt
    if status == 130:
        exec(
            ""
        )  # else Python remembers an interrupt inside somebody's exec, and ends by the signal instead of this status
    sys.exit(status)


if __name__ == "__main__":
    start()
