"""One holder at a time, for as long as it lives, and no trace of a holder that wrote nothing."""

from __future__ import annotations

import errno
import fcntl as flock
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flora_train.config.errors import UserError
from flora_train.runtime import run_lock
from flora_train.runtime.run_lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from flora_train.runtime.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
getattr(lock, sys.argv[2])()
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path, how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_lock_is_held_against_other_processes_until_its_holder_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    process = holder(folder, "take")
    try:
        for action in (RunLock(folder).take, RunLock(folder).share, lambda: RunLock(folder).take(0.3)):
            with pytest.raises(
                UserError, match=r"output_dir = .*: another process trains or evaluates in it"
            ):
                action()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    lock = RunLock(folder)
    lock.take()
    assert lock.held


def test_readers_share_a_lock_and_keep_writers_out(tmp_path: Path) -> None:
    process = holder(tmp_path, "share")
    try:
        reader = RunLock(tmp_path)
        reader.share()
        reader.release()
        with pytest.raises(UserError, match="another process"):
            RunLock(tmp_path).take()
    finally:
        process.kill()
        process.wait()


def test_lock_that_is_released_unused_leaves_no_folder(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "a" / "b")
    lock.take()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.take()
    (tmp_path / "a" / "b" / "file").touch()
    lock.release()
    assert (tmp_path / "a" / "b" / "file").exists()


def test_lock_whose_file_was_removed_meanwhile_is_taken_on_the_new_file(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    (tmp_path / ".lock").unlink()
    second.take()
    with pytest.raises(UserError):
        RunLock(tmp_path).take()


def test_lock_is_not_inherited_by_a_fork(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writes)
        os.read(reads, 1)  # lives until the parent has looked
        os._exit(0)
    lock.release()
    RunLock(tmp_path).take()
    os.close(writes)
    os.waitpid(child, 0)


@pytest.mark.usefixtures("log_to_stderr")
def test_lock_on_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", refused)
    lock = RunLock(tmp_path)
    lock.take()
    assert not lock.enforced
    assert "no file locks in" in capsys.readouterr().err
    monkeypatch.setattr(run_lock, "fcntl", None)
    RunLock(tmp_path).take()


def test_lock_of_windows_excludes_every_other_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With msvcrt's function on top of flock, which like it locks a file against other descriptors."""

    def locking(descriptor: int, mode: str, size: int) -> None:
        assert size == 1
        operation = flock.LOCK_UN if mode == "unlock" else flock.LOCK_EX | flock.LOCK_NB
        try:
            flock.flock(descriptor, operation)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    module = SimpleNamespace(LK_NBLCK="lock", LK_UNLCK="unlock", locking=locking)
    monkeypatch.setattr(run_lock, "fcntl", None)
    monkeypatch.setattr(run_lock, "msvcrt", module)
    first = RunLock(tmp_path)
    first.take()
    assert first.enforced
    for action in (RunLock(tmp_path).take, RunLock(tmp_path).share):
        with pytest.raises(UserError, match="another process trains or evaluates in it"):
            action()
    first.release()
    RunLock(tmp_path).share()


def test_lock_does_not_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"may not be written .*link"):
        RunLock(tmp_path).take()
    assert not (tmp_path / "elsewhere").exists()
