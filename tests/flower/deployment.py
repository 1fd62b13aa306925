"""SuperLink and SuperNodes on loopback, started with Flower's own commands."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[2]
APP = ROOT / "launch" / "flower"
BIN = Path(sys.executable).parent
TLS_FILES = ("ca.crt", "server.pem", "server.key")
PATIENCE = 900
"""Seconds for what has to happen: a start, or a round in which all clients answer. On a busy machine a
process needs minutes to load; on a free one nothing waits so long."""


def free_port() -> int:
    """A port that nothing listened to a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@dataclass
class Deployment:
    """A SuperLink and its SuperNodes. All of their files are in one folder."""

    folder: Path
    port: int = field(default_factory=free_port)
    certificates: Path | None = None
    """Folder with TLS_FILES; None: no TLS."""
    link: subprocess.Popen[bytes] | None = None
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Of all processes: nothing reaches outside, and nothing is written outside of the folder."""
        return {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(self.folder / "flwr_home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
        }

    def start_link(self, *flags: str) -> None:
        """Start the SuperLink, and wait until it answers."""
        home = self.folder / "flwr_home"
        home.mkdir(parents=True, exist_ok=True)
        secure = "insecure = true"
        tls = ["--insecure"]
        if self.certificates is not None:
            ca, certificate, key = (str(self.certificates / name) for name in TLS_FILES)
            secure = f'root-certificates = "{ca}"'
            tls = ["--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key]
        connection = f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{self.port}"\n'
        (home / "config.toml").write_text(f"{connection}{secure}\n")
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.link = self._start("superlink", ["flower-superlink", *tls, *address, *flags])
        scheme = "http" if self.certificates is None else "https"
        verify = True if self.certificates is None else str(self.certificates / TLS_FILES[0])
        wait_until(lambda: self._answers(f"{scheme}://127.0.0.1:{self.port}/health", verify), PATIENCE)

    def start_node(
        self, client: str, *flags: str, name: str | None = None, cwd: Path | None = None, **config: str
    ) -> None:
        """Start the SuperNode of a client.

        Args:
            client: Its name.
            flags: Further ones of flower-supernode.
            name: Of its process and log. Default: that of the client.
            cwd: Where it runs. Default: the folder of the deployment.
            config: Further keys of its configuration.
        """
        tls = ["--insecure"]
        if self.certificates is not None:
            tls = ["--root-certificates", str(self.certificates / TLS_FILES[0])]
        address = ["--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", str(free_port())]
        words = " ".join(f'{key}="{value}"' for key, value in {"client": client, **config}.items())
        command = ["flower-supernode", *tls, *address, "--node-config", words, *flags]
        self.nodes[name or client] = self._start(name or client, command, cwd)

    def kill_node(self, name: str) -> None:
        """End a SuperNode, and what it started, at once."""
        end(self.nodes.pop(name), signal.SIGKILL)

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `flwr`."""
        return subprocess.run(
            [str(BIN / "flwr"), *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def run(self, app: Path = APP, **config: str | int | float | bool) -> str:
        """`flwr run`; the id of the run. config: of the run, with `_` for `-`."""
        given = {"start_timeout": PATIENCE, **config}
        words = [f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in given.items()]
        done = self.flwr("run", str(app), "own", "--run-config", " ".join(words), "--format", "json")
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.search(r'"run-id": "(\d+)"', done.stdout)
        assert found, done.stdout
        return found[1]

    def status(self, run: str) -> str:
        """What Flower says about a run, such as `finished:completed`."""
        done = self.flwr("list", "--run-id", run, "own", "--format", "json")
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.search(r'"status": "([^"]+)"', done.stdout)
        assert found, done.stdout
        return found[1]

    def wait(self, run: str, limit: float = 3 * PATIENCE) -> str:
        """Wait for the end of a run; its status. The log is looked at, since `flwr list` takes seconds."""
        ended = re.compile(rf"Finished task \d+ of run {run}\b")
        wait_until(lambda: ended.search(self.log()) is not None, limit)
        return self.status(run)

    def output(self, run: str) -> str:
        """What the ServerApp of a run logged."""
        done = self.flwr("log", run, "own", "--show")
        return done.stdout + done.stderr

    def log(self, name: str = "superlink") -> str:
        """What a process wrote."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_for_file(self, path: Path, limit: float = PATIENCE) -> None:
        """Wait until a file is there."""
        wait_until(path.exists, limit)

    def stop(self) -> None:
        """End all processes that were started here."""
        for node in self.nodes.values():
            end(node, signal.SIGKILL)
        self.nodes = {}
        if self.link is not None:
            end(self.link, signal.SIGKILL)

    def kill_server(self) -> None:
        """End the process of the ServerApp at once."""
        assert self.link is not None
        servers = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            address = f"127.0.0.1:{self.port}"
            if any(word.endswith("/flwr-serverapp") for word in words) and address in words:
                servers.append(process)
        (server,) = servers
        server.kill()

    def _start(self, name: str, command: Sequence[str], cwd: Path | None = None) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=cwd or self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _answers(self, url: str, verify: bool | str) -> bool:
        assert self.link is not None
        assert self.link.poll() is None, self.log()
        try:
            return httpx.get(url, verify=verify, trust_env=False).is_success
        except httpx.HTTPError:
            return False


def wait_until(condition: Callable[[], bool], limit: float, pause: float = 0.2) -> None:
    """Wait for a condition. limit: seconds, after which the test fails."""
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until, f"nothing within {limit} s"
        time.sleep(pause)


def end(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal a process with all that it started, and wait for its end."""
    if process.poll() is None:
        os.killpg(process.pid, number)
    process.wait(timeout=120)


@contextmanager
def deployment(folder: Path, clients: Sequence[str], **options: Path | None) -> Iterator[Deployment]:
    """A SuperLink with a SuperNode for each client, which end with the context."""
    own = Deployment(folder, **options)  # type: ignore[arg-type]
    try:
        own.start_link()
        for client in clients:
            own.start_node(client)
        yield own
    finally:
        own.stop()
