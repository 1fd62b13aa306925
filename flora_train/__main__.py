"""python -m flora_train, and the flora-train command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def start(words: Sequence[str] | None = None) -> None:
    """Run the command line (default: the arguments of the process) and exit with its status.

    Ctrl-C shows no traceback while the first modules load or while the process ends.
    """
    try:
        from flora_train.cli import main

        status = main(words)
    except KeyboardInterrupt:
        status = 130
    # From here on Python shuts down; its own handler would show a traceback of an interrupt.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if status == 130:
        # Python remembers an interrupt inside an exec() and would then end by the signal instead of with this
        # status; an exec() that ends normally clears that.
        exec("")
    sys.exit(status)


if __name__ == "__main__":
    start()
