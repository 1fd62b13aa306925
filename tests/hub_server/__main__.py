"""Serves FOLDER/models/ORG/NAME/... and FOLDER/datasets/ORG/NAME/... as a hub on loopback.

Runs until it is stopped.

Prints the environment in which clients use it. `--faults all` injects every fault that a reader survives.
"""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from tests.hub_server import TOKEN, serve
from tests.hub_server.faults import KINDS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", action="append", default=[], choices=["all", *KINDS])
    parser.add_argument("--gated", action="append", default=[], metavar="ORG/NAME", help="gated repositories")
    options = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with serve(options.port) as hub:
        for repo_type in ("model", "dataset"):
            for folder in sorted((options.folder / f"{repo_type}s").glob("*/*")):
                name = f"{folder.parent.name}/{folder.name}"
                hub.add_folder(name, folder, repo_type, gated=name in options.gated)
        hub.add_faults(*options.faults)
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        stopped.wait()


if __name__ == "__main__":
    main()
