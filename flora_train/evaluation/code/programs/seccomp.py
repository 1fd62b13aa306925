"""A seccomp filter of system calls that fail in the sandbox as if they did not exist.

They allocate memory that no limit or process statistic covers (files in memory, detached shared segments,
queues, semaphores), or read the user's keyrings.
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
"""Machine architecture -> system call -> number."""
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's audit constants (linux/audit.h)."""
X32 = 0x40000000
"""The bit that marks x32 system calls on x86-64."""
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
"""Instructions of the Berkeley packet filter (linux/bpf_common.h)."""
ALLOW, UNAVAILABLE = 0x7FFF0000, 0x00050000 | 38
"""SECCOMP_RET_ALLOW, and SECCOMP_RET_ERRNO with ENOSYS, after which libraries fall back to files."""


def deny_filter(machine: str | None = None) -> bytes | None:
    """The filter in the kernel's binary form; None for a machine architecture without a table here.

    System calls of other architectures, which the same kernel may offer, are denied as well.
    """
    machine = machine or platform.machine()
    if machine not in DENIED:
        return None
    numbers = list(DENIED[machine].values())
    steps = [(LOAD, 0, 0, 4), (EQUAL, 0, len(numbers) + 3, ARCHITECTURE[machine]), (LOAD, 0, 0, 0)]
    steps.append((AT_LEAST, len(numbers) + 1, 0, X32))
    steps += [(EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, UNAVAILABLE)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
