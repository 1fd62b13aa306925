"""What may a generated program touch? Its own work folder and a read-only system, in namespaces of its own, without network.

bubblewrap makes the namespaces. As root the user is dropped first: root inside them would keep its rights over files. It is started
without the caller's environment and takes its arguments from a descriptor, because a program can read both of process 1. What it
does not cover: bugs of the kernel, and time on the machine's cores beyond the CPU limit of one process.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from threading import Event
from typing import Literal

from flora_train.config.errors import user_error
from flora_train.evaluation.code.programs.memory_limit import SCRATCH
from flora_train.evaluation.code.programs.process import INFO, Command, run_command
from flora_train.evaluation.code.programs.sandbox_paths import (
    clean_path,
    find_program,
    hidden_below,
    private_folders,
    work_folder,
)
from flora_train.evaluation.code.programs.seccomp import deny_filter
from flora_train.evaluation.code.programs.toolchain_cache import ToolchainCache

logger = logging.getLogger(__name__)

Kind = Literal["bubblewrap", "none"]
NOBODY = 65534
PREPARED = "/prepared"
"""Where a language's prepared folder stands for its compiler."""
SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
SETTINGS = (
    "alternatives",
    "ld.so.cache",
    "php",
    "R",
    "mono",
    "ocaml",
    "ghc",
    "ldc2.conf",
    "elixir",
    "scala",
    "clojure",
    "racket",
)
"""What interpreters want of /etc."""
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "GOCACHE": "/tmp/go"}
"""All variables of a program in the sandbox."""
ARGUMENTS, CALLS = "descriptor:arguments", "descriptor:calls"
"""Words of a command that stand for the descriptors of bubblewrap's arguments and of its filter of system calls."""
UNCONFINED = (
    "sandbox=none: programs run unconfined. They get a clean environment, but as the same user they can read your files and the "
    "environment of every process of yours, this one too: run without tokens in it"
)
"""The warning where nothing confines a program."""


@dataclass(frozen=True)
class Limits:
    """cpu: seconds of one process; memory: bytes of its data, and of all that its processes hold together; processes, descriptors of each
    (pipes hold memory, too), and bytes of a file and of a scratch folder."""

    cpu: float
    memory: int = 2 << 30
    processes: int = 64
    descriptors: int = 1024
    file: int = 64 << 20
    scratch: int = 256 << 20

    @property
    def whole_cpu(self) -> int:
        """Whole seconds, as the kernel takes them."""
        return max(1, round(self.cpu))

    @property
    def wall(self) -> float:
        """Seconds on the clock: generous, because others share the cores, and only the CPU limit judges."""
        return 3 * self.cpu + 10


@dataclass(frozen=True)
class Sandbox:
    """kind: bubblewrap, or none where the user asked for it; prepared: what its languages prepared once; filtered: some system calls
    are denied, where the kernel can do that; stop: once it is set, what runs is ended."""

    kind: Kind
    prepared: ToolchainCache = field(default_factory=ToolchainCache, compare=False)
    filtered: bool = True
    stop: Event = field(default_factory=Event, compare=False)

    def command(
        self,
        words: Sequence[str],
        folder: Path,
        limits: Limits,
        writable: bool = False,
        prepared: Path | None = None,
        stdin: str | None = None,
    ) -> Command:
        """`words` with `folder` as the current directory, confined. writable: they may write there, as a compiler must; a
        program has its scratch folder, whose size is limited. {prepared} in a word is where the folder `prepared` can be read.
        stdin: what the command reads."""
        if prepared is not None:
            place = PREPARED if self.kind == "bubblewrap" else str(prepared)
            words = [word.replace("{prepared}", place) for word in words]
        limited = [
            "prlimit",
            f"--cpu={limits.whole_cpu}",
            f"--data={limits.memory}",
            f"--fsize={limits.file}",
            f"--nofile={limits.descriptors}",
            "--core=0",
            *([f"--nproc={limits.processes}"] if self.kind == "bubblewrap" else []),
            "--",
            *words,
        ]
        if self.kind == "none":
            return Command(limited, folder, _unconfined_environment(words, folder), limits.memory, stdin=stdin, stop=self.stop)
        data = {ARGUMENTS: "\0".join(_bubblewrap(folder, limits, writable, prepared)).encode()}
        bubblewrap = [find_program("bwrap") or "bwrap", "--args", ARGUMENTS, "--info-fd", INFO]
        if self.filtered and (calls := deny_filter()) is not None:
            data[CALLS] = calls
            bubblewrap += ["--seccomp", CALLS]
        drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"] if os.geteuid() == 0 else []
        path = {"PATH": ENVIRONMENT["PATH"]}
        return Command(
            [*drop, *bubblewrap, "--", *limited],
            Path("/"),
            path,
            limits.memory,
            limits.scratch,
            data=data,
            stdin=stdin,
            stop=self.stop,
        )

    def own(self, folder: Path) -> None:
        """Let the sandbox's user write there."""
        if self.kind == "bubblewrap" and os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)


def _unconfined_environment(words: Sequence[str], folder: Path) -> Mapping[str, str]:
    """Nothing of the caller's; the work folder is home, and goes with the program."""
    home = str(folder)
    return {**ENVIRONMENT, "PATH": clean_path(words), "HOME": home, "TMPDIR": home, "GOCACHE": f"{home}/.cache/go"}


def _bubblewrap(folder: Path, limits: Limits, writable: bool, prepared: Path | None) -> list[str]:
    """Its arguments, apart from those that name descriptors."""
    words = [
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--die-with-parent",
        "--new-session",
        "--hostname",
        "sandbox",
        "--cap-drop",
        "ALL",
    ]
    hidden: list[Path] = []
    for part in (Path("/") / name for name in SYSTEM):
        if part.is_symlink():
            words += ["--symlink", os.readlink(part), str(part)]
        elif part.exists():
            words += ["--ro-bind", str(part), str(part)]
            hidden += hidden_below(part)
    for settings in [Path("/etc") / name for name in SETTINGS] + sorted(Path("/etc").glob("java*")) + [Path("/var/lib/ghc")]:
        words += ["--ro-bind-try", str(settings), str(settings)]
    words += ["--proc", "/proc", "--dev", "/dev"]
    for scratch in SCRATCH:
        words += ["--size", str(limits.scratch), "--tmpfs", scratch]
    words += ["--bind" if writable else "--ro-bind", str(folder), "/program", "--chdir", "/program", "--clearenv"]
    if prepared is not None:
        words += ["--ro-bind", str(prepared), PREPARED]
    for path in hidden:
        words += ["--size", "4096", "--tmpfs", str(path), "--remount-ro", str(path)]
    words += ["--remount-ro", "/dev", "--remount-ro", "/"]  # bubblewrap's own tmpfs, which knows no size
    for name, value in ENVIRONMENT.items():
        words += ["--setenv", name, value]
    return words


def no_programs_here() -> str | None:
    """Why this system cannot execute generated programs at all; None on Linux."""
    try:
        import fcntl
        import resource  # noqa: F401
    except ImportError:
        return "programs are executed on Linux only: on Windows use WSL. Everything else runs here, and completions that are kept can be executed there"
    if sys.platform == "linux" and hasattr(fcntl, "F_SETPIPE_SZ"):
        return None
    return "programs are executed on Linux only: use a container or another machine. Everything else runs here, and completions that are kept can be executed there"


def open_sandbox(kind: Kind) -> Sandbox:
    """Raises UserError where bubblewrap cannot confine a program here: nothing runs unconfined unless that was asked for, and then
    a process warns once."""
    if (reason := no_programs_here()) is not None:
        raise user_error("evaluation.sandbox", kind, reason)
    if shutil.which("prlimit") is None:
        raise user_error("evaluation.sandbox", kind, "needs the program prlimit: apt-get install util-linux")
    sandbox = Sandbox(kind)
    if kind == "none":
        _warn_once()
        return sandbox
    off = "evaluation.sandbox=none runs programs unconfined, and the report says so"
    program = find_program("bwrap")
    if program is None:
        raise user_error("evaluation.sandbox", kind, f"needs bubblewrap: apt-get install bubblewrap. {off}")
    if any(Path(program).resolve().is_relative_to(folder) for folder in private_folders()):
        words = f"programs could read the name of the folder of {program}: install bubblewrap for the whole system. {off}"
        raise user_error("evaluation.sandbox", kind, words)
    if (reason := _why_not(sandbox)) is not None:
        sandbox = replace(sandbox, filtered=False)  # a kernel without filters of system calls
        reason = _why_not(sandbox)
    if reason is not None:
        words = f"does not work here ({reason}): this kernel or container may forbid user namespaces. {off}"
        raise user_error("evaluation.sandbox", kind, words)
    return sandbox


@cache
def _warn_once() -> None:
    logger.warning(UNCONFINED)


def _why_not(sandbox: Sandbox) -> str | None:
    """What a test program that should be confined says instead; None where it is confined."""
    with work_folder(confined=True) as name:
        folder = Path(name)
        sandbox.own(folder)
        test = ["/bin/sh", "-c", "touch inside && ! touch /usr/outside 2>/dev/null"]
        probe = run_command(sandbox.command(test, folder, Limits(cpu=5), writable=True), Limits(cpu=5).wall)
        if probe.status == 0 and (folder / "inside").exists():
            return None
        return (probe.errors.strip().splitlines() or ["it did not confine a test program"])[-1]
