"""vLLM's server as a child process: started, waited for, asked, and ended with its parent."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from flora_train.config.errors import UserError, first_line, user_error
from flora_train.config.terminal_text import plain
from flora_train.serving.launch import CHECK_ONLY
from flora_train.serving.vllm_flags import Flags

logger = logging.getLogger(__name__)

LAUNCH = (sys.executable, "-m", "flora_train.serving.launch")
POLL = 0.5
"""Seconds between two questions whether the server is ready."""
PATIENCE = 60.0
"""Seconds that the server may take to end, before it is killed."""
ANSWER = 600.0
"""Seconds for an answer of the check."""
MOST_OF_REASON = 500
"""Characters of a refusal that are shown."""


class VllmServer:
    """A running `vllm serve`."""

    def __init__(self, process: subprocess.Popen[bytes], host: str, port: int, flags: Flags) -> None:
        self.process = process
        scheme = "https" if "--ssl-certfile" in flags else "http"
        self.address = f"{scheme}://{shown_host(host)}:{port}"
        self._key = api_key(flags)
        self._ssl = None
        if scheme == "https":  # of our own child, whose certificate names another host
            self._ssl = ssl._create_unverified_context()

    def wait_until_ready(self) -> None:
        """Raises UserError if the server ends before it answers."""
        while True:
            self.check_running("before it could serve")
            try:
                with urlopen(f"{self.address}/health", timeout=5, context=self._ssl):
                    return
            except HTTPError:  # it answers, and is not ready
                time.sleep(POLL)
            except OSError:
                time.sleep(POLL)

    def check_running(self, when: str) -> None:
        """Raises UserError if the server has ended."""
        status = self.process.poll()
        if status is not None:
            raise user_error("vllm serve", None, f"ended with status {status} {when}: its reason is above")

    def post(self, path: str, content: Mapping[str, Any]) -> Any:
        """The answer's content. Raises UserError for a refusal."""
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = Request(f"{self.address}{path}", json.dumps(content).encode(), headers)
        try:
            with urlopen(request, timeout=ANSWER, context=self._ssl) as answer:
                return json.loads(answer.read())
        except HTTPError as error:
            reason = error.read().decode(errors="replace")[:MOST_OF_REASON]
            raise user_error(
                "vllm serve", content.get("model"), f"answered {error.code}: {reason}"
            ) from error
        except (OSError, ValueError) as error:
            self.check_running("while it was checked")
            raise user_error("vllm serve", None, f"does not answer: {first_line(error)}") from error

    def wait(self) -> None:
        """Until the server ends, which it does not by itself. Raises UserError."""
        while True:
            try:
                self.process.wait(timeout=3600)
            except subprocess.TimeoutExpired:
                continue
            self.check_running("while it served")

    def stop(self) -> None:
        """Let the server finish and end; kill it if it does not."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            logger.warning(f"vLLM did not end within {PATIENCE:.0f} s: killed")
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def api_key(flags: Flags) -> str | None:
    """The key that clients must send, if there is one."""
    return flags.value("--api-key") or os.environ.get("VLLM_API_KEY") or None


@contextmanager
def running_server(
    words: Sequence[str], environment: Mapping[str, str], *, host: str, port: int, flags: Flags
) -> Iterator[VllmServer]:
    """A context in which `vllm serve` runs, starts it, and ends it. SIGTERM ends it as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    process = subprocess.Popen(
        [*LAUNCH, *words],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),  # standard output is for what this command says
        start_new_session=True,  # Ctrl-C is for this process, which passes it on once
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    server = VllmServer(process, host, port, flags)
    try:
        yield server
    finally:
        server.stop()
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """In the child: receive SIGTERM when the parent ends, also if it is killed."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM))


def shown_host(host: str) -> str:
    """The host in an address that reaches a server on this machine."""
    if host in ("", "0.0.0.0"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def free_port(host: str, port: int) -> int:
    """This port, or a free one for 0. Raises UserError if it cannot be listened on."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise user_error("--host", host, f"is no address of this machine ({error.strerror})") from error
    except PermissionError as error:
        hint = f"may not be used by this user ({error.strerror}): choose one above 1023, or --port 0"
        raise user_error("--port", port, hint) from error
    except OSError as error:
        hint = f"cannot be listened on at {host} ({error.strerror}): choose another one, or --port 0 for any"
        raise user_error("--port", port, hint) from error


def check_flags(words: Sequence[str]) -> None:
    """Let vLLM's own parser read a command line, before anything long. Raises UserError."""
    done = subprocess.run(
        [*LAUNCH, CHECK_ONLY, *words],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        _, _, reason = lines[-1].rpartition("error: ")
        raise UserError(*user_error("vllm serve", None, f"refuses its flags: {plain(reason)}").problems)
