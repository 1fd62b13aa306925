"""A SLURM cluster of two nodes on this machine, on the loopback, with all its files in one folder."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.forked import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
MISSING = [
    program
    for program in PROGRAMS
    if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
]
NODES = ("n1", "n2")
CONFIGURATION = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/pgid
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32 RealMemory=4000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32 RealMemory=4000 Gres=gpu:1
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""
"""CPUs and GPUs are pretended: launch/slurm.sh asks for many."""


@dataclass(frozen=True)
class Cluster:
    """Its nodes are n1 and n2. environment: what SLURM's commands, and the jobs, get."""

    environment: Mapping[str, str]

    def submit(self, said: Path, *words: str) -> str:
        """The number of a job of launch/slurm.sh with these words, whose output goes to `said`."""
        return self.ask(
            "sbatch", "--parsable", "--gpus-per-node=1", f"--output={said}", "launch/slurm.sh", *words
        ).strip()

    def ask(self, *command: str) -> str:
        done = self.try_to(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def try_to(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=dict(self.environment), capture_output=True, text=True, timeout=60
        )

    def fact(self, job: str, name: str) -> str:
        """What SLURM says of a job: JobState, Restarts, ..."""
        found = re.search(rf"\b{name}=(\S+)", self.ask("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def wait(self, job: str, *states: str, patience: float = 180.0) -> str:
        """The one of these states that the job comes to."""
        _until(lambda: self.fact(job, "JobState") in states, patience)
        return self.fact(job, "JobState")

    def start_again(self, job: str) -> None:
        """A job that went back to the queue would wait there for two minutes."""
        self.wait(job, "PENDING")
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        self.wait(job, "RUNNING")


@contextmanager
def cluster(environment: Mapping[str, str]) -> Iterator[Cluster]:
    """Needs root, for names of the nodes that only they see, and the programs of PROGRAMS."""
    with TemporaryDirectory(prefix="slurm") as name, ExitStack() as daemons:
        folder = Path(name)
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname(), folder=folder, ports=[_free_port() for _ in range(3)]
            )
        )
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()} {' '.join(NODES)}\n")
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        path = f"{environment['PATH']}:/usr/sbin:/sbin"
        ours = Cluster({**environment, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")})
        files = [f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")]
        commands = [
            ["munged", "--foreground", "--force", f"--socket={folder / 'socket'}", *files],
            ["slurmctld", "-D"],
        ]
        named = f"mount --bind {folder / 'hosts'} /etc/hosts && exec slurmd -D -N "
        commands += [["unshare", "--mount", "sh", "-c", named + node] for node in NODES]
        for command in commands:
            daemons.enter_context(_running(command, ours.environment))
            time.sleep(1.0)
        _until(lambda: ours.try_to("sinfo", "--noheader", "--format=%T").stdout.split() == ["idle"])
        try:
            yield ours
        finally:
            ours.ask("scancel", "--user=root")
            _until(lambda: not ours.ask("squeue", "--noheader"))


@contextmanager
def _running(command: list[str], environment: Mapping[str, str]) -> Iterator[None]:
    """stderr goes to pytest's own."""
    with subprocess.Popen(command, env=dict(environment), stdout=subprocess.DEVNULL) as daemon:
        try:
            yield
        finally:
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _until(condition: Callable[[], bool], patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _free_port() -> int:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
