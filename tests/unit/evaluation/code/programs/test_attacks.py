"""Hostile programs and what stops them. As root, the sandbox first changes to an ordinary user."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from flora_train.evaluation.code.programs.execute import Program, Verdict, execute
from flora_train.evaluation.code.programs.sandbox import Limits, Sandbox
from tests.unit.evaluation.code.conftest import working

PTRACE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
others = [int(p) for p in os.listdir("/proc") if p.isdigit() and int(p) not in (1, os.getpid())]
attached = [p for p in (*others, os.getppid()) if p > 2 and libc.ptrace(16, p, None, None) == 0]
sys.exit(7 if attached else 0)
"""


def attack(sandbox: Sandbox, key: str, source: str, seconds: float = 2.0) -> Verdict:
    return execute(Program(working(key, sandbox).model_copy(update={"seconds": seconds}), source), sandbox)


@pytest.mark.parametrize(
    "path", ["/etc/shadow", "/root", "/home", str(Path.home()), str(Path(__file__).parent)]
)
def test_the_users_files_are_not_visible(path: str, sandbox: Sandbox) -> None:
    assert attack(sandbox, "sh", f"cat {path} || ls {path}/*").status != "OK"


@pytest.mark.parametrize(
    "path", ["/usr/bin/mine", "/etc/mine", "/program/mine", "/mine", "/dev/mine", "/proc/mine"]
)
def test_nothing_outside_the_scratch_folder_can_be_written(path: str, sandbox: Sandbox) -> None:
    assert attack(sandbox, "sh", f"echo x > {path}").status != "OK"
    assert attack(sandbox, "sh", "echo x > /tmp/mine && [[ $(cat /tmp/mine) = x ]]").status == "OK"


def test_there_is_no_network_not_even_the_loopback_of_this_machine(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host, at in (("127.0.0.1", port), ("1.1.1.1", 53)):
            source = f"import socket\nsocket.create_connection(({host!r}, {at}), timeout=1)"
            assert attack(sandbox, "py", source).status != "OK"


@pytest.fixture
def hurried_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stops a program after five seconds instead of 3 * cpu + 10."""
    monkeypatch.setattr(Limits, "wall", 5.0)


@pytest.mark.usefixtures("hurried_clock")
def test_fork_bomb_is_confined(sandbox: Sandbox) -> None:
    verdict = attack(sandbox, "sh", ":(){ :|:& };:; sleep 1; :")
    assert verdict.seconds < 20
    assert attack(sandbox, "sh", "true").status == "OK"


def test_memory_is_limited(sandbox: Sandbox) -> None:
    assert attack(sandbox, "py", "x = bytearray(8 << 30)").status == "OutOfMemory"


def test_a_gigabyte_of_output_is_drained(sandbox: Sandbox) -> None:
    verdict = attack(sandbox, "sh", "head -c 1000000000 /dev/zero", seconds=10)
    assert verdict.status == "OK"
    assert len(verdict.output) <= 2000


@pytest.mark.parametrize("folder", ["/tmp", "/program", "/dev/shm"])
def test_the_disk_cannot_be_filled(folder: str, sandbox: Sandbox) -> None:
    source = f"for i in 1 2 3 4 5 6 7 8 9; do head -c 60000000 /dev/zero > {folder}/$i || exit 1; done"
    assert attack(sandbox, "sh", source, seconds=10).status != "OK"


def test_a_program_that_ignores_signals_is_killed(sandbox: Sandbox) -> None:
    verdict = attack(sandbox, "sh", "trap '' TERM INT HUP XCPU\nwhile :; do :; done", seconds=1)
    assert verdict.status == "Timeout"
    assert verdict.seconds < 20


@pytest.mark.usefixtures("hurried_clock")
def test_a_sleeping_program_is_killed_by_the_clock(sandbox: Sandbox) -> None:
    verdict = attack(sandbox, "sh", "sleep 1000", seconds=1)
    assert verdict.status == "Timeout"
    assert verdict.seconds < 20


def test_a_daemon_does_not_outlive_its_program(sandbox: Sandbox) -> None:
    assert attack(sandbox, "sh", "setsid nohup sleep 98765 >/dev/null 2>&1 &\n:").status == "OK"
    until = time.monotonic() + 10  # the kernel ends a sandbox's processes a moment after its first one
    while (
        left := subprocess.run(["pgrep", "-f", "sleep 98765"], capture_output=True).stdout
    ) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == b""


def test_processes_outside_cannot_be_killed_or_traced(sandbox: Sandbox) -> None:
    with subprocess.Popen(["sleep", "30"]) as sibling:
        attack(sandbox, "sh", f"kill -9 {sibling.pid} $PPID; kill -9 -1")
        assert sibling.poll() is None
        assert attack(sandbox, "py", PTRACE).exit != 7
        sibling.kill()


ORDINARY = [
    pytest.param("signals or written or network", id="some"),
    pytest.param("not ordinary_user", id="all", marks=pytest.mark.full),
]


@pytest.mark.parametrize("selected", ORDINARY)
def test_an_ordinary_user_s_sandbox_contains_all_of_this_too(selected: str) -> None:
    """The tests of this file once more, in a process that is not root and has no rights to regain."""
    if os.geteuid() != 0:
        pytest.skip("the tests above ran as an ordinary user already")
    user = [
        "setpriv",
        "--reuid=65533",
        "--regid=65533",
        "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--",
    ]
    if subprocess.run(
        [*user, sys.executable, "-c", "import pytest, flora_train"], capture_output=True
    ).returncode:
        pytest.skip("another user may not read this Python or this folder")
    with TemporaryDirectory() as folder:  # those of pytest can only be read by root
        Path(folder).chmod(0o777)
        words = ["-q", "-rs", "-p", "no:cacheprovider", f"--basetemp={folder}/own", "-k", selected, __file__]
        environment = {**os.environ, "HOME": folder, "TMPDIR": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
        done = subprocess.run(
            [*user, sys.executable, "-m", "pytest", *words], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
