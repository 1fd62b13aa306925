"""What may a generated program touch? Its own work folder and a read-only system, in namespaces of its own, without network.

bubblewrap makes the namespaces. As root the user is dropped first: root inside them would keep its rights over files. What it
does not cover: bugs of the kernel, and time on the machine's cores beyond the CPU limit of one process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flora_train.config.errors import fail
from flora_train.evaluation.code.programs.prepared import PreparedFolders

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


@dataclass(frozen=True)
class Limits:
    """cpu: seconds of one process; memory: bytes of its data; processes, and bytes of a file and of the scratch folder."""

    cpu: float
    memory: int = 2 << 30
    processes: int = 64
    file: int = 64 << 20
    scratch: int = 256 << 20

    @property
    def wall(self) -> float:
        """Seconds on the clock: generous, because others share the cores, and only the CPU limit judges."""
        return 3 * self.cpu + 10


@dataclass(frozen=True)
class Sandbox:
    """kind: bubblewrap, or none where the user asked for it; prepared: what its languages prepared once."""

    kind: Kind
    prepared: PreparedFolders = field(default_factory=PreparedFolders, compare=False)

    def command(
        self, words: Sequence[str], folder: Path, limits: Limits, writable: bool = False, prepared: Path | None = None
    ) -> list[str]:
        """`words` with `folder` as the current directory, confined. writable: they may write there, as a compiler must; a
        program has its scratch folder, whose size is limited. {prepared} in a word is where the folder `prepared` can be read."""
        if prepared is not None:
            place = PREPARED if self.kind == "bubblewrap" else str(prepared)
            words = [word.replace("{prepared}", place) for word in words]
        limited = [
            "prlimit",
            f"--cpu={max(1, round(limits.cpu))}",
            f"--data={limits.memory}",
            f"--fsize={limits.file}",
            "--core=0",
            *([f"--nproc={limits.processes}"] if self.kind == "bubblewrap" else []),
            "--",
            *words,
        ]
        if self.kind == "none":
            return limited
        drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"] if os.geteuid() == 0 else []
        return [*drop, *_bubblewrap(folder, limits, writable, prepared), *limited]

    def own(self, folder: Path) -> None:
        """Let the sandbox's user write there."""
        if self.kind == "bubblewrap" and os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)


def _bubblewrap(folder: Path, limits: Limits, writable: bool, prepared: Path | None) -> list[str]:
    words = [
        "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
    ]
    for part in (Path("/") / name for name in SYSTEM):
        if part.is_symlink():
            words += ["--symlink", os.readlink(part), str(part)]
        elif part.exists():
            words += ["--ro-bind", str(part), str(part)]
    for settings in [Path("/etc") / name for name in SETTINGS] + sorted(Path("/etc").glob("java*")) + [Path("/var/lib/ghc")]:
        words += ["--ro-bind-try", str(settings), str(settings)]
    words += ["--proc", "/proc", "--dev", "/dev"]
    for scratch in ("/tmp", "/dev/shm"):
        words += ["--size", str(limits.scratch), "--tmpfs", scratch]
    words += ["--bind" if writable else "--ro-bind", str(folder), "/program", "--chdir", "/program", "--clearenv"]
    if prepared is not None:
        words += ["--ro-bind", str(prepared), PREPARED]
    words += ["--remount-ro", "/dev", "--remount-ro", "/"]  # bubblewrap's own tmpfs, which knows no size
    for name, value in {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "GOCACHE": "/tmp/go"}.items():
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
    """Raises UserError where bubblewrap cannot confine a program here: nothing runs unconfined unless that was asked for."""
    if (reason := no_programs_here()) is not None:
        raise fail("evaluation.sandbox", kind, reason)
    if shutil.which("prlimit") is None:
        raise fail("evaluation.sandbox", kind, "needs the program prlimit: apt-get install util-linux")
    sandbox = Sandbox(kind)
    if kind == "none":
        return sandbox
    off = "evaluation.sandbox=none runs programs unconfined, and the report says so"
    if shutil.which("bwrap") is None:
        raise fail("evaluation.sandbox", kind, f"needs bubblewrap: apt-get install bubblewrap. {off}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sandbox.own(folder)
        probe = subprocess.run(
            sandbox.command(
                ["/bin/sh", "-c", "touch inside && ! touch /usr/outside 2>/dev/null"], folder, Limits(cpu=5), writable=True
            ),
            capture_output=True,
            text=True,
        )
        if probe.returncode or not (folder / "inside").exists():
            said = (probe.stderr.strip().splitlines() or ["it did not confine a test program"])[-1]
            raise fail(
                "evaluation.sandbox",
                kind,
                f"does not work here ({said}): this kernel or container may forbid user namespaces. {off}",
            )
    return sandbox
