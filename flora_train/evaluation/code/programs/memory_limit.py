"""Measures the memory that all processes of a program hold together, and the CPU time of the longest of them.

The kernel limits the data of each process (RLIMIT_DATA), but not shared mappings, the sum over processes, or
what it holds itself for a program: page tables, file names in scratch folders, socket buffers. The sum is
therefore measured while a program runs, and the program is stopped when it is too large.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

INITIAL_PROCESSES = ("1", "2")
"""Process ids in a sandbox of bubblewrap and of prlimit, which becomes the program."""
UNMEASURED_CPU = 0.2
"""CPU seconds that a process may use between the last measurement and its end."""
CHARGED = ("Pss_Anon:", "Pss_Shmem:", "SwapPss:", "Shared_Hugetlb:", "Private_Hugetlb:")
"""Lines of smaps_rollup that count. Pages of files on disk do not, as the kernel can drop them at any time.
"""
SCRATCH = ("/tmp", "/dev/shm")
"""The scratch folders in the sandbox."""
FILE_NAME = 1024
"""Bytes that the kernel holds for every file in a scratch folder, even an empty one."""
MAPPED_PER_TABLE_BYTE = 512
"""Bytes of a mapping per byte of its page tables, if every page has an entry."""


class SandboxMemory:
    """Memory of all processes in a sandbox, read from the sandbox's own /proc.

    info: file descriptor on which bubblewrap reports its process id. limit: bytes. scratch: bytes of each
    scratch folder.
    """

    tick = 0.02
    """Seconds between two measurements."""

    def __init__(self, info: int, limit: int, scratch: int) -> None:
        self.info, self.limit, self.scratch = info, limit, scratch
        self._root: str | None = None
        self._report = b""
        self._cpu = 0.0

    def exceeded(self) -> bool:
        """Whether the processes hold more than the limit now.

        A sandbox that is starting or has ended holds nothing.
        """
        with suppress(OSError):
            root = self._find_root()
            if root is None:
                return False
            names = [name for name in os.listdir(f"{root}/proc") if name.isdigit()]
            for name in names:
                if name not in INITIAL_PROCESSES:
                    self._cpu = max(self._cpu, _cpu_seconds(f"{root}/proc/{name}"))
            available = self.limit - self._files(root) - _sockets(root.removesuffix("/root"))
            return _exceeds([f"{root}/proc/{name}" for name in names], available)
        return False

    def computed(self, waited_for: float) -> float:
        """CPU seconds of the longest process started by the program, as last measured.

        waited_for: the kernel's sum over processes that were waited for; not used, as bubblewrap does not
        wait.
        """
        return self._cpu + UNMEASURED_CPU if self._cpu else 0.0

    def _find_root(self) -> str | None:
        """The sandbox's root folder as seen from outside, once its own /proc is mounted."""
        if self._root is None:
            with suppress(BlockingIOError):
                self._report += os.read(self.info, 4096)
            with suppress(ValueError, KeyError, TypeError):
                self._root = f"/proc/{int(json.loads(self._report)['child-pid'])}/root"
        if self._root is None or os.stat(f"{self._root}/proc").st_dev == os.stat("/proc").st_dev:
            return None
        return self._root

    def _files(self, root: str) -> int:
        """Bytes in the scratch folders, including names.

        Mapped files count twice, which errs on the safe side.
        """
        used = 0
        for folder in SCRATCH:
            status = os.statvfs(root + folder)
            if status.f_blocks * status.f_frsize == self.scratch:  # otherwise it is not mounted yet
                used += (status.f_blocks - status.f_bfree) * status.f_frsize
                used += (status.f_files - status.f_ffree) * FILE_NAME
        return used


class SessionMemory:
    """Memory of the processes of a session and of their children, without a sandbox.

    A process that starts its own session after its parent has ended is not found.
    """

    tick = 0.2
    """Seconds between two measurements, each of which reads all processes of the machine."""

    def __init__(self, session: int, limit: int) -> None:
        self.session, self.limit = session, limit

    def exceeded(self) -> bool:
        """Whether the processes hold more than the limit now."""
        return _exceeds([f"/proc/{pid}" for pid in _members(self.session)], self.limit)

    def computed(self, waited_for: float) -> float:
        """CPU seconds of the program and all processes that were waited for, together."""
        return waited_for


def _exceeds(folders: Sequence[str], limit: int) -> bool:
    """Whether processes hold more than a limit. folders: their folders in /proc.

    An upper bound is quick to read; the share of each process in shared memory is read only if the bound is
    too large.
    """
    if sum(map(_upper_bound, folders)) <= limit:
        return False
    return sum(_held(folder) + _page_tables(folder) for folder in folders) > limit


def _cpu_seconds(folder: str) -> float:
    with (
        suppress(OSError, IndexError, ValueError),
        open(f"{folder}/stat", encoding="ascii", errors="replace") as file,
    ):
        fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _upper_bound(folder: str) -> int:
    """Bytes of resident memory, and of page tables for everything that is mapped."""
    with suppress(OSError, IndexError, ValueError), open(f"{folder}/statm", encoding="ascii") as file:
        mapped, resident = map(int, file.read().split()[:2])
        return (resident + mapped // MAPPED_PER_TABLE_BYTE) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _page_tables(folder: str) -> int:
    path = f"{folder}/status"
    with suppress(OSError, IndexError, ValueError), open(path, encoding="ascii", errors="replace") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith("VmPTE:")), 0)
    return 0


def _sockets(process: str) -> int:
    """Bytes that the buffers of all sockets in a sandbox's network can hold. process: folder of one of its
    processes.
    """
    with suppress(OSError, IndexError, ValueError), open(f"{process}/net/sockstat", encoding="ascii") as file:
        return int(file.readline().split()[2]) * _largest_buffers()
    return 0


@cache
def _largest_buffers() -> int:
    """Bytes that the send and receive buffers of one socket can hold. The kernel doubles a requested size."""
    size = 0
    for side in ("wmem", "rmem"):
        requested, automatic = _setting(f"core/{side}_max", 212_992), _setting(f"ipv4/tcp_{side}", 6 << 20)
        size += max(2 * requested, automatic)
    return size


def _setting(name: str, default: int) -> int:
    """The last number of a network setting."""
    with suppress(OSError, IndexError, ValueError), open(f"/proc/sys/net/{name}", encoding="ascii") as file:
        return int(file.read().split()[-1])
    return default


def _resident(folder: str) -> int:
    with suppress(OSError, IndexError, ValueError), open(f"{folder}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _held(folder: str) -> int:
    held, known = 0, False
    with suppress(OSError), open(f"{folder}/smaps_rollup", encoding="ascii") as file:
        for line in file:
            name, value, *_ = line.split()
            if name in CHARGED:
                held += int(value) << 10
                known |= name == "Pss_Anon:"
        return held if known else _resident(folder)
    return _resident(folder)


def _members(session: int) -> set[int]:
    """The processes of a session, and all their descendants."""
    parents: dict[int, int] = {}
    members = {session}
    for name in os.listdir("/proc"):
        if name.isdigit():
            path = f"/proc/{name}/stat"
            with (
                suppress(OSError, IndexError, ValueError),
                open(path, encoding="ascii", errors="replace") as file,
            ):
                fields = file.read().rpartition(")")[2].split()
                parents[int(name)] = int(fields[1])
                if int(fields[3]) == session:
                    members.add(int(name))
    growing = True
    while growing:
        children = {pid for pid, parent in parents.items() if parent in members and pid not in members}
        members |= children
        growing = bool(children)
    return members
