"""How much memory the processes of one program hold together: their own, what they share, and files in scratch folders. And how
long a process computed that the program started.

The kernel bounds the data of each process (RLIMIT_DATA), but neither shared mappings nor the sum, nor what it keeps for a program itself:
page tables, file names in scratch folders, buffers of sockets. The sum is therefore measured while a program runs, and the program is stopped when it is too large.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache

FIRST = ("1", "2")
"""Processes of a sandbox: bubblewrap, and the program itself."""
UNSEEN = 0.2
"""Seconds that a process may compute between the last look at it and its end."""
COUNTED = ("Pss_Anon:", "Pss_Shmem:", "SwapPss:", "Shared_Hugetlb:", "Private_Hugetlb:")
"""Lines of smaps_rollup whose sum is charged. Pages of files on a disk are not: the kernel can drop them at any time."""
SCRATCH = ("/tmp", "/dev/shm")
"""The scratch folders in the sandbox."""
FILE_NAME = 1024
"""Bytes that the kernel keeps for a file in a scratch folder, an empty one too."""
MAPPED_BY_ENTRY = 512
"""Bytes of a mapping for each byte of its page tables, where every page has an entry."""


class SandboxMemory:
    """Of all processes in one sandbox, seen through the sandbox's own /proc. info: descriptor on which bubblewrap reports its
    process; limit: bytes; scratch: bytes of each scratch folder."""

    tick = 0.02
    """Seconds between two looks."""

    def __init__(self, info: int, limit: int, scratch: int) -> None:
        self.info, self.limit, self.scratch = info, limit, scratch
        self._root: str | None = None
        self._said = b""
        self._computed = 0.0

    def exceeded(self) -> bool:
        """Whether the processes hold more than the limit now. A sandbox that is still being made, or is gone, holds nothing."""
        with suppress(OSError):
            if (root := self._find_root()) is not None:
                proc = f"{root}/proc"
                names = [name for name in os.listdir(proc) if name.isdigit()]
                self._computed = max([self._computed, *(_computed(f"{proc}/{name}") for name in names if name not in FIRST)])
                return _over(
                    [f"{proc}/{name}" for name in names], self.limit - self._files(root) - _sockets(root.removesuffix("/root"))
                )
        return False

    def computed(self, waited_for: float) -> float:
        """Seconds that a process which the program started computed, the longest of them, as last seen. waited_for: what was
        counted of all is too little here, for bubblewrap does not wait."""
        return self._computed + UNSEEN if self._computed else 0.0

    def _find_root(self) -> str | None:
        """The sandbox's root as seen from here, as soon as its /proc is not ours any more."""
        if self._root is None:
            with suppress(BlockingIOError):
                self._said += os.read(self.info, 4096)
            with suppress(ValueError, KeyError, TypeError):
                self._root = f"/proc/{int(json.loads(self._said)['child-pid'])}/root"
        if self._root is None or os.stat(f"{self._root}/proc").st_dev == os.stat("/proc").st_dev:
            return None
        return self._root

    def _files(self, root: str) -> int:
        """Bytes in the scratch folders, names included. A file that is mapped is counted twice, which errs on the safe side."""
        used = 0
        for folder in SCRATCH:
            found = os.statvfs(root + folder)
            if found.f_blocks * found.f_frsize == self.scratch:  # not there yet, otherwise
                used += (found.f_blocks - found.f_bfree) * found.f_frsize + (found.f_files - found.f_ffree) * FILE_NAME
        return used


class SessionMemory:
    """Of the processes that belong to one session or were started by one of them, where there is no sandbox. A process that
    begins a session of its own after its parent has ended is not found."""

    tick = 0.2
    """Seconds between two looks: each goes through all processes of the machine."""

    def __init__(self, session: int, limit: int) -> None:
        self.session, self.limit = session, limit

    def exceeded(self) -> bool:
        """Whether the processes hold more than the limit now."""
        return _over([f"/proc/{pid}" for pid in _members(self.session)], self.limit)

    def computed(self, waited_for: float) -> float:
        """Seconds that the program and all that it waited for computed together."""
        return waited_for


def _over(processes: Iterable[str], limit: int) -> bool:
    """processes: their folders. What they hold at most is quick to read; only where that is too much is shared memory divided among
    its holders."""
    folders = list(processes)
    if sum(map(_at_most, folders)) <= limit:
        return False
    return sum(_held(folder) + _page_tables(folder) for folder in folders) > limit


def _computed(folder: str) -> float:
    with suppress(OSError, IndexError, ValueError), open(f"{folder}/stat", encoding="ascii", errors="replace") as file:
        words = file.read().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _at_most(folder: str) -> int:
    """What is resident, and page tables for all that is mapped."""
    with suppress(OSError, IndexError, ValueError), open(f"{folder}/statm", encoding="ascii") as file:
        mapped, resident = map(int, file.read().split()[:2])
        return (resident + mapped // MAPPED_BY_ENTRY) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _page_tables(folder: str) -> int:
    with suppress(OSError, IndexError, ValueError), open(f"{folder}/status", encoding="ascii", errors="replace") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith("VmPTE:")), 0)
    return 0


def _sockets(process: str) -> int:
    """Bytes that the buffers of all sockets in the sandbox's network can hold; process: the folder of one that is in it."""
    with suppress(OSError, IndexError, ValueError), open(f"{process}/net/sockstat", encoding="ascii") as file:
        return int(file.readline().split()[2]) * _largest_buffers()
    return 0


@cache
def _largest_buffers() -> int:
    """Bytes that one socket can hold, sent and received. A size that a program asks for is doubled by the kernel."""
    size = 0
    for side in ("wmem", "rmem"):
        asked, grown = _setting(f"core/{side}_max", 212_992), _setting(f"ipv4/tcp_{side}", 6 << 20)
        size += max(2 * asked, grown)
    return size


def _setting(name: str, default: int) -> int:
    """The last number of a setting of the network."""
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
            words = line.split()
            if words[0] in COUNTED:
                held += int(words[1]) << 10
                known |= words[0] == "Pss_Anon:"
        return held if known else _resident(folder)
    return _resident(folder)


def _members(session: int) -> Iterator[int]:
    parents: dict[int, int] = {}
    members = {session}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with (
                suppress(OSError, IndexError, ValueError),
                open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file,
            ):
                words = file.read().rpartition(")")[2].split()
                parents[int(name)] = int(words[1])
                if int(words[3]) == session:
                    members.add(int(name))
    growing = True
    while growing:
        found = {pid for pid, parent in parents.items() if parent in members and pid not in members}
        members |= found
        growing = bool(found)
    yield from members
