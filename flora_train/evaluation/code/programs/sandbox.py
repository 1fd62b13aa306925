"""A bubblewrap sandbox: a program sees its own work folder and a read-only system, and has no network.

bubblewrap creates the namespaces. If it is started as root, the user is changed first, as root inside the
namespaces would keep its rights over files. It is started without the user's environment and reads its
arguments from a file descriptor, because a program can read both of process 1. The sandbox does not protect
against bugs of the kernel, nor limit the CPU time of a program beyond that of each process.
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

SandboxKind = Literal["bubblewrap", "none"]
NOBODY = 65534
PREPARED = "/prepared"
"""Mount point of a language's prepared folder."""
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
"""Entries of /etc that interpreters need."""
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "GOCACHE": "/tmp/go"}
"""All environment variables in the sandbox."""
ARGUMENTS, CALLS = "descriptor:arguments", "descriptor:calls"
"""Placeholders in a command for the file descriptors of bubblewrap's arguments and its system call filter."""
UNCONFINED = (
    "sandbox=none: programs run unconfined. Their environment is clean, but they run as your user, and can "
    "read your files and the environment of all your processes, including this one: run it without tokens in "
    "it"
)
"""Warning if nothing confines the programs."""


@dataclass(frozen=True)
class Limits:
    """Limits of one command."""

    cpu: float
    """CPU seconds of one process."""
    memory: int = 2 << 30
    """Bytes of the data of a process, and of everything that all processes hold together."""
    processes: int = 64
    descriptors: int = 1024
    """File descriptors of a process; each pipe holds memory."""
    file: int = 64 << 20
    """Bytes of a file."""
    scratch: int = 256 << 20
    """Bytes of each scratch folder."""

    @property
    def whole_cpu(self) -> int:
        """CPU limit in whole seconds, as the kernel requires."""
        return max(1, round(self.cpu))

    @property
    def wall(self) -> float:
        """Limit of elapsed seconds; generous, as cores are shared and only the CPU limit should decide."""
        return 3 * self.cpu + 10


@dataclass(frozen=True)
class Sandbox:
    """Turns commands into confined commands."""

    kind: SandboxKind
    """bubblewrap, or none where the user asked for it."""
    prepared: ToolchainCache = field(default_factory=ToolchainCache, compare=False)
    filtered: bool = True
    """Whether some system calls are denied, if the kernel supports it."""
    stop: Event = field(default_factory=Event, compare=False)
    """Once set, running commands are ended."""

    def command(
        self,
        argv: Sequence[str],
        folder: Path,
        limits: Limits,
        *,
        writable: bool = False,
        prepared: Path | None = None,
        stdin: str | None = None,
    ) -> Command:
        """The confined form of a command, with `folder` as its current directory.

        writable: whether it can write to `folder`, as a compiler must; a program only has its scratch
        folders. prepared: folder to be mounted read-only; {prepared} in a word is replaced by its path.
        """
        if prepared is not None:
            prepared_path = PREPARED if self.kind == "bubblewrap" else str(prepared)
            argv = [word.replace("{prepared}", prepared_path) for word in argv]
        limited = [*self._prlimit(limits), "--", *argv]
        if self.kind == "none":
            return Command(
                argv=limited,
                folder=folder,
                environment=_unconfined_environment(argv, folder),
                memory=limits.memory,
                stdin=stdin,
                stop=self.stop,
            )
        arguments = _bubblewrap_arguments(folder, limits, writable=writable, prepared=prepared)
        data = {ARGUMENTS: "\0".join(arguments).encode()}
        bubblewrap = [find_program("bwrap") or "bwrap", "--args", ARGUMENTS, "--info-fd", INFO]
        if self.filtered and (calls := deny_filter()) is not None:
            data[CALLS] = calls
            bubblewrap += ["--seccomp", CALLS]
        if os.geteuid() == 0:
            user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
            bubblewrap = [*user, *bubblewrap]
        return Command(
            argv=[*bubblewrap, "--", *limited],
            folder=Path("/"),
            environment={"PATH": ENVIRONMENT["PATH"]},
            memory=limits.memory,
            scratch=limits.scratch,
            data=data,
            stdin=stdin,
            stop=self.stop,
        )

    def own(self, folder: Path) -> None:
        """Make the sandbox's user the owner of a folder."""
        if self.kind == "bubblewrap" and os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)

    def _prlimit(self, limits: Limits) -> list[str]:
        argv = [
            "prlimit",
            f"--cpu={limits.whole_cpu}",
            f"--data={limits.memory}",
            f"--fsize={limits.file}",
            f"--nofile={limits.descriptors}",
            "--core=0",
        ]
        if self.kind == "bubblewrap":
            argv.append(f"--nproc={limits.processes}")
        return argv


def _unconfined_environment(argv: Sequence[str], folder: Path) -> Mapping[str, str]:
    """Nothing of the user's environment; the work folder, which is deleted with the program, is the home
    folder.
    """
    home = str(folder)
    return {
        **ENVIRONMENT,
        "PATH": clean_path(argv),
        "HOME": home,
        "TMPDIR": home,
        "GOCACHE": f"{home}/.cache/go",
    }


def _bubblewrap_arguments(
    folder: Path, limits: Limits, *, writable: bool, prepared: Path | None
) -> list[str]:
    """bubblewrap's arguments, without those for file descriptors."""
    argv = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    argv += ["--hostname", "sandbox", "--cap-drop", "ALL"]
    hidden: list[Path] = []
    for part in (Path("/") / name for name in SYSTEM):
        if part.is_symlink():
            argv += ["--symlink", os.readlink(part), str(part)]
        elif part.exists():
            argv += ["--ro-bind", str(part), str(part)]
            hidden += hidden_below(part)
    settings = [Path("/etc") / name for name in SETTINGS]
    for path in (*settings, *sorted(Path("/etc").glob("java*")), Path("/var/lib/ghc")):
        argv += ["--ro-bind-try", str(path), str(path)]
    argv += ["--proc", "/proc", "--dev", "/dev"]
    for scratch in SCRATCH:
        argv += ["--size", str(limits.scratch), "--tmpfs", scratch]
    argv += [
        "--bind" if writable else "--ro-bind",
        str(folder),
        "/program",
        "--chdir",
        "/program",
        "--clearenv",
    ]
    if prepared is not None:
        argv += ["--ro-bind", str(prepared), PREPARED]
    for path in hidden:
        argv += ["--size", "4096", "--tmpfs", str(path), "--remount-ro", str(path)]
    argv += ["--remount-ro", "/dev", "--remount-ro", "/"]  # bubblewrap's own tmpfs, which has no size limit
    for name, value in ENVIRONMENT.items():
        argv += ["--setenv", name, value]
    return argv


def unsupported_system() -> str | None:
    """Why this system cannot execute generated programs; None on Linux."""
    elsewhere = "Everything else runs here, and saved completions can be executed there"
    try:
        import fcntl
        import resource  # noqa: F401
    except ImportError:
        return f"programs are executed on Linux only: on Windows use WSL. {elsewhere}"
    if sys.platform == "linux" and hasattr(fcntl, "F_SETPIPE_SZ"):
        return None
    return f"programs are executed on Linux only: use a container or another machine. {elsewhere}"


def open_sandbox(kind: SandboxKind) -> Sandbox:
    """A working sandbox. Raises UserError if bubblewrap cannot confine a program here.

    Nothing runs unconfined unless kind is none, for which a process warns once.
    """
    if (reason := unsupported_system()) is not None:
        raise user_error("evaluation.sandbox", kind, reason)
    if shutil.which("prlimit") is None:
        raise user_error("evaluation.sandbox", kind, "needs the program prlimit: apt-get install util-linux")
    sandbox = Sandbox(kind)
    if kind == "none":
        _warn_once()
        return sandbox
    alternative = "evaluation.sandbox=none runs programs unconfined, and the report says so"
    program = find_program("bwrap")
    if program is None:
        hint = f"needs bubblewrap: apt-get install bubblewrap. {alternative}"
        raise user_error("evaluation.sandbox", kind, hint)
    if any(Path(program).resolve().is_relative_to(folder) for folder in private_folders()):
        hint = (
            f"programs could read the path of {program}: install bubblewrap for the whole system. "
            f"{alternative}"
        )
        raise user_error("evaluation.sandbox", kind, hint)
    if (reason := _failure(sandbox)) is not None:
        sandbox = replace(sandbox, filtered=False)  # a kernel without system call filters
        reason = _failure(sandbox)
    if reason is not None:
        hint = (
            f"does not work here ({reason}): this kernel or container may forbid user namespaces. "
            f"{alternative}"
        )
        raise user_error("evaluation.sandbox", kind, hint)
    return sandbox


@cache
def _warn_once() -> None:
    logger.warning(UNCONFINED)


def _failure(sandbox: Sandbox) -> str | None:
    """The error of a test program, or why it is not confined; None if the sandbox works."""
    with work_folder(confined=True) as name:
        folder = Path(name)
        sandbox.own(folder)
        limits = Limits(cpu=5)
        argv = ["/bin/sh", "-c", "touch inside && ! touch /usr/outside 2>/dev/null"]
        ended = run_command(sandbox.command(argv, folder, limits, writable=True), limits.wall)
        if ended.status == 0 and (folder / "inside").exists():
            return None
        return (ended.errors.strip().splitlines() or ["it did not confine a test program"])[-1]
