"""`python WORDS` forked from a process that has loaded torch and transformers, which saves most of the time.

Nothing else is shared: each has an environment, arguments, streams and an exit status of its own, and may be
killed.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import constants

from flora_train.models import loading as base_model

ROOT = Path(__file__).resolve().parents[1]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "flora_train.cli",  # first: it says how torch's threads wait
        "flora_train.commands.execute",
        "flora_train.commands.export",
        "flora_train.run_context",
        "flora_train.commands.solve",
        "flora_train.training.trainer",
        "peft",
        "transformers.models.llama.modeling_llama",
    ]
)


class Forked:
    """`python *words` in a folder, running. The first of a test process takes the seconds that the others
    save. `model.dtype=auto` is float32 in it, whatever this CPU multiplies fast: a test of bfloat16 names it
    in its recipe."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], folder: Path = ROOT) -> None:
        self.words = list(words)
        self._folder = TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        self._process = _server.Process(
            target=_become, args=(self.words, dict(environment), folder, self._streams)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status, -N if signal N ended it, or None while it runs."""
        return self._process.exitcode

    def said(self) -> str:
        """Its standard error so far."""
        return self._streams[1].read_text(encoding="utf-8") if self._streams[1].exists() else ""

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Raises TimeoutExpired, having killed it."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.words, timeout, stderr=self.said())
        out, err = (file.read_text(encoding="utf-8") for file in self._streams)
        return subprocess.CompletedProcess(self.words, status, out, err)


def start(
    words: Sequence[str], environment: Mapping[str, str], processes: int = 1, folder: Path = ROOT
) -> list[Forked]:
    """`python *words`, or as many of them as torchrun would start."""
    if processes == 1:
        return [Forked(words, environment, folder)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return [
        Forked(words, {**environment, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}, folder)
        for rank in range(processes)
    ]


def python(
    *words: str, environment: Mapping[str, str] = os.environ, processes: int = 1, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """`python *words` in a folder; or as many of them as torchrun would start, of which one that fails ends
    all."""
    ranks = start(words, environment, processes, folder)
    patience = time.monotonic() + 300
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        assert time.monotonic() < patience
        time.sleep(0.02)
    if processes > 1 and any(rank.poll() for rank in ranks):
        time.sleep(1.0)  # for what the others have to say
        for rank in ranks:
            rank.kill()
    done = [rank.wait() for rank in ranks]
    status = next((one.returncode for one in done if one.returncode > 0), done[0].returncode)
    return subprocess.CompletedProcess(
        list(words), status, "".join(one.stdout for one in done), "".join(one.stderr for one in done)
    )


def _read_hub_settings(environment: Mapping[str, str]) -> None:
    """What the hub's client reads from the environment when it is imported."""
    constants.HF_HUB_OFFLINE = environment.get("HF_HUB_OFFLINE") == "1"
    if "HF_ENDPOINT" in environment:
        constants.ENDPOINT = environment["HF_ENDPOINT"]
        constants.HUGGINGFACE_CO_URL_TEMPLATE = (
            constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        )
        constants.HF_HUB_DISABLE_XET = True
    if "HF_HOME" in environment:
        constants.HF_HUB_CACHE = os.path.join(environment["HF_HOME"], "hub")
        constants.HF_TOKEN_PATH = os.path.join(environment["HF_HOME"], "token")


def _become(words: list[str], environment: dict[str, str], folder: Path, streams: list[Path]) -> None:
    for number, file in enumerate(streams, start=1):
        with file.open("wb") as stream:
            os.dup2(stream.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    base_model.multiplies_bfloat16_fast = lambda device: False
    _read_hub_settings(environment)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = words[:1]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
