"""The memory of a program is limited as the sum over its processes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from flora_train.evaluation.code.programs.execute import Program, execute
from flora_train.evaluation.code.programs.process import run_command
from flora_train.evaluation.code.programs.sandbox import Limits, Sandbox, open_sandbox
from flora_train.evaluation.code.programs.sandbox_paths import work_folder
from flora_train.evaluation.code.programs.seccomp import ARCHITECTURE, DENIED, deny_filter
from tests.unit.evaluation.code.conftest import working

LIMIT = 192 << 20
"""Small, so that the tests are quick."""
HELD = {
    "shared mapping": (
        "import mmap, time\nm = mmap.mmap(-1, 300 << 20)\nfor i in range(0, 300 << 20, 4096): "
        "m[i] = 1\ntime.sleep(9)"
    ),
    "shared by two": (
        "import mmap, os, time\nm = mmap.mmap(-1, 300 << 20)\nos.fork()\n"
        "for i in range(0, 300 << 20, 4096): m[i] = 1\ntime.sleep(9)"
    ),
    "many processes": (
        "import os, time\nfor i in range(6):\n  if os.fork() == 0:\n"
        "    x = b'1' * (60 << 20); time.sleep(9)\ntime.sleep(9)"
    ),
    "daemons": "import os, time\nfor i in range(6):\n  if os.fork() == 0:\n    os.setsid()\n"
    "    if os.fork(): os._exit(0)\n"
    "    x = b'1' * (60 << 20); time.sleep(9)\ntime.sleep(9)",
    "files": (
        "import time\nx = b'1' * (60 << 20)\nfor d in ('/tmp', '/dev/shm'):\n"
        "  for i in range(2): open(f'{d}/{i}', 'wb').write(x)\ntime.sleep(9)"
    ),
    "deleted files": "import time\nx = b'1' * (50 << 20)\nf = [open(f'/tmp/{i}', 'wb') for i in range(4)]\n"
    "import os\nfor i, g in enumerate(f): os.unlink(f'/tmp/{i}'); g.write(x); g.flush()\ntime.sleep(9)",
    "names of files": (
        "import os\nfor i in range(400_000): os.close(os.open(f'/tmp/{i}', os.O_CREAT | os.O_WRONLY))"
    ),
    "page tables": "import ctypes, time\nc = ctypes.CDLL(None)\nc.mmap.restype = ctypes.c_void_p\n"
    "at = c.mmap(None, ctypes.c_size_t(1 << 43), 1, 0x4022, -1, ctypes.c_long(0))\n"
    "c.madvise(ctypes.c_void_p(at), ctypes.c_size_t(1 << 43), 15)\n"
    "for i in range(80_000): ctypes.string_at(at + (i << 21), 1)\ntime.sleep(9)",
    "sockets": "import socket, time\nk = [socket.socketpair() for _ in range(400)]\nfor a, b in k:\n"
    "  a.setblocking(False)\n  try:\n    while True: a.send(b'1' * 65536)\n"
    "  except BlockingIOError: pass\ntime.sleep(9)",
}
DENIED_CALLS = {
    "memfd_create": "import os\nos.memfd_create('x')",
    "shmget": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "if c.shmget(0, 4096, 0o1600) < 0: raise OSError(ctypes.get_errno(), 'shmget')"
    ),
    "msgget": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "if c.msgget(0, 0o1600) < 0: raise OSError(ctypes.get_errno(), 'msgget')"
    ),
    "semget": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "if c.semget(0, 9, 0o1600) < 0: raise OSError(ctypes.get_errno(), 'semget')"
    ),
    "keyctl": "import ctypes, platform\nc = ctypes.CDLL(None, use_errno=True)\n"
    "n = {'x86_64': 250, 'aarch64': 219}[platform.machine()]\n"
    "if c.syscall(n, 0, -3, 0) < 0: raise OSError(ctypes.get_errno(), 'keyctl')",
}


def held(source: str, kind: str, tmp_path: Path) -> bool:
    """Whether a Python program was stopped because of its memory."""
    sandbox = open_sandbox(kind)  # type: ignore[arg-type]
    limits = Limits(cpu=10, memory=LIMIT)
    with work_folder(confined=kind == "bubblewrap") as name:
        folder = Path(name)
        (folder / "main.py").write_text(source)
        sandbox.own(folder)
        ended = run_command(sandbox.command(["/usr/bin/python3", "main.py"], folder, limits), 8)
    assert not ended.timed_out, ended
    return ended.over_memory


@pytest.mark.parametrize("what", HELD)
def test_sandbox_memory_is_limited_over_all_processes(what: str, sandbox: Sandbox, tmp_path: Path) -> None:
    working("py", sandbox)
    assert held(HELD[what], "bubblewrap", tmp_path)


@pytest.mark.parametrize("what", ["shared mapping", "many processes"])
def test_unconfined_memory_is_limited_over_all_processes(what: str, sandbox: Sandbox, tmp_path: Path) -> None:
    working("py", sandbox)
    assert held(HELD[what], "none", tmp_path)


def test_shared_memory_is_counted_once(sandbox: Sandbox, tmp_path: Path) -> None:
    working("py", sandbox)
    source = (
        "import mmap, os, time\nm = mmap.mmap(-1, 80 << 20)\nm[:] = b'1' * (80 << 20)\nfor i in range(3):\n"
        "  os.fork()\nn = m[:1]; time.sleep(0.5)"
    )
    assert not held(source, "bubblewrap", tmp_path)


def test_too_much_memory_is_out_of_memory(sandbox: Sandbox) -> None:
    language = working("py", sandbox)
    source = "import mmap\nm = mmap.mmap(-1, 3 << 30)\nfor i in range(0, 3 << 30, 4096): m[i] = 1"
    assert execute(Program(language, source), sandbox).status == "OutOfMemory"


def test_pipes_are_few_enough_to_hold_little(sandbox: Sandbox) -> None:
    source = "import os\nfor i in range(4000): os.pipe()"
    verdict = execute(Program(working("py", sandbox), source), sandbox)
    assert "Too many open files" in verdict.output


@pytest.mark.parametrize("name", DENIED_CALLS)
def test_hidden_memory_and_keyrings_are_denied(name: str, sandbox: Sandbox) -> None:
    if not sandbox.filtered or deny_filter() is None:
        pytest.skip("this kernel or machine cannot deny system calls")
    verdict = execute(Program(working("py", sandbox), DENIED_CALLS[name]), sandbox)
    assert verdict.status == "Exception"
    assert "[Errno 38]" in verdict.output


@pytest.mark.parametrize("machine", DENIED)
def test_the_filter_denies_exactly_the_named_calls(machine: str) -> None:
    content = deny_filter(machine)
    assert content is not None
    steps = list(struct.iter_unpack("=HBBI", content))

    def answer(architecture: int, number: int) -> int:
        at, value = 0, 0
        while True:
            code, yes, no, k = steps[at]
            if code == 0x20:
                value, at = (architecture if k == 4 else number), at + 1
            elif code == 0x06:
                return k
            else:
                holds = value == k if code == 0x15 else value >= k
                at += 1 + (yes if holds else no)

    denied = {number for number in range(1000) if answer(ARCHITECTURE[machine], number) != 0x7FFF0000}
    assert denied == set(DENIED[machine].values())
    assert answer(0x40000003, 5) != 0x7FFF0000  # another architecture of the same kernel
    assert answer(ARCHITECTURE[machine], 0x40000000 + 5) != 0x7FFF0000
    assert deny_filter("riscv64") is None
