"""How much memory the processes of one program hold together: their own, what they share, and files in scratch folders. And how
long a process computed that the program started.

The kernel bounds the data of each process (RLIMIT_DATA), but neither shared mappings nor the sum. The sum is therefore measured
while a program runs, and the program is stopped when it is too large.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

FIRST = ("1", "2")
"""Processes of a sandbox: bubblewrap, and the program itself."""
UNSEEN = 0.2
"""Seconds that a process may compute between the last look at it and its end."""
COUNTED = ("Pss_Anon:", "Pss_Shmem:", "SwapPss:", "Shared_Hugetlb:", "Private_Hugetlb:")
"""Lines of smaps_rollup whose sum is charged. Pages of files on a disk are not: the kernel can drop them at any time."""
SCRATCH = ("/tmp", "/dev/shm")
"""The scratch folders in the sandbox."""


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
                return _over([f"{proc}/{name}" for name in names], self.limit - self._files(root))
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
        """Bytes in the scratch folders. A file that is mapped is counted twice, which errs on the safe side."""
        used = 0
        for folder in SCRATCH:
            found = os.statvfs(root + folder)
            if found.f_blocks * found.f_frsize == self.scratch:  # not there yet, otherwise
                used += (found.f_blocks - found.f_bfree) * found.f_frsize
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
    """processes: their folders. What they have resident is quick to read and at least what they hold; only where that is too much
    is shared memory divided among its holders."""
    folders = list(processes)
    if sum(map(_resident, folders)) <= limit:
        return False
    return sum(map(_held, folders)) > limit


def _computed(folder: str) -> float:
    with suppress(OSError, IndexError, ValueError), open(f"{folder}/stat", encoding="ascii", errors="replace") as file:
        words = file.read().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


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
