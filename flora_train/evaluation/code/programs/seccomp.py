"""System calls that a program in the sandbox may not make: they answer that they do not exist.

They hold memory that no limit and no look at a process sees (files that live only in memory, shared segments that nobody has
attached, queues, semaphores), or read the keyrings of the user who started us.
"""

from __future__ import annotations

import platform
import struct

DENIED = {
    "x86_64": {
        "memfd_create": 319,
        "memfd_secret": 447,
        "shmget": 29,
        "msgget": 68,
        "semget": 64,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
    },
    "aarch64": {
        "memfd_create": 279,
        "memfd_secret": 447,
        "shmget": 194,
        "msgget": 186,
        "semget": 190,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
    },
}
"""Machine -> name -> number."""
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""As the kernel's audit names them (linux/audit.h)."""
X32 = 0x40000000
"""The bit of x86-64's second set of system calls."""
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
"""Instructions of the kernel's packet filter (linux/bpf_common.h)."""
ALLOW, NOT_THERE = 0x7FFF0000, 0x00050000 | 38
"""SECCOMP_RET_ALLOW, and SECCOMP_RET_ERRNO with ENOSYS, on which libraries fall back to files."""


def deny_filter(machine: str | None = None) -> bytes | None:
    """The filter as the kernel reads it; None for a machine whose numbers are not known here. Calls of another architecture,
    which the same kernel may offer, are denied as well."""
    machine = machine or platform.machine()
    if machine not in DENIED:
        return None
    numbers = list(DENIED[machine].values())
    steps = [(LOAD, 0, 0, 4), (EQUAL, 0, len(numbers) + 3, ARCHITECTURE[machine]), (LOAD, 0, 0, 0)]
    steps.append((AT_LEAST, len(numbers) + 1, 0, X32))
    steps += [(EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, NOT_THERE)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
