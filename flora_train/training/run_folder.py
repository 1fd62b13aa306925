"""What does a run leave on disk, and how is nothing half-written? `outputs/<run>/` and its files."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import torch

from flora_train import __version__
from flora_train.config.errors import UserError, fail
from flora_train.config.load import PROJECT_ROOT, load_config, save_config
from flora_train.config.schema import RunConfig


class RunFolder:
    """Paths and writers of one run. Every file is written whole, or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.run_json = path / "run.json"
        self.checkpoints = path / "checkpoints"
        self.adapters = path / "adapters"
        self.evaluation = path / "eval"

    @property
    def finished(self) -> bool:
        return bool((self._state or {}).get("finished"))

    def finished_twin(self, config: RunConfig) -> bool:
        """Whether the folder holds a finished run of this configuration that the user wants to keep.

        Raises UserError if it holds something that may not be replaced.
        """
        if not self._occupied:
            return False
        if self._state is None:
            raise fail("output_dir", str(self.path), "is not empty and holds no run of ours: choose another folder")
        if config.existing_run == "reuse" and self._same_run(config):
            return self.finished
        if config.existing_run != "replace":
            kind = "a finished run" if self.finished else "an unfinished run"
            hint = " of another configuration" if config.existing_run == "reuse" else ""
            raise fail(
                "output_dir",
                str(self.path),
                f"holds {kind}{hint}: choose another output_dir, or existing_run=replace to delete it",
            )
        return False

    def claim(self, config: RunConfig) -> None:
        """Make the folder this run's own. What was there is deleted under existing_run=replace; an interrupted run of the
        same configuration is set aside under another name."""
        self.finished_twin(config)
        with disk_errors(self.path):
            if self._occupied and config.existing_run == "replace":
                shutil.rmtree(self.path)
            elif self._occupied:
                names = (self.path.with_name(f"{self.path.name}.interrupted-{n}") for n in count(1))
                self.path.rename(next(name for name in names if not name.exists()))
            self.path.mkdir(parents=True, exist_ok=True)
        # run.json first: it is what makes the folder ours, also if the disk is full before the second file
        self.write_run_json({"finished": False, "started": now(), **environment()})
        write_atomically(self.config, lambda path: save_config(config, path))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One JSON line. A line that does not fit on the disk is taken back."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        try:
            with disk_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_strict(record), allow_nan=False) + "\n")
        except UserError:
            with suppress(OSError):
                os.truncate(self.metrics, size)
            raise

    def read_metrics(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind (`step`, `evaluation`), oldest first."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines[:-1]]  # what follows the last line end was cut off by a kill
        return [record for record in records if record["kind"] == kind]

    def write_run_json(self, content: dict[str, Any]) -> None:
        write_atomically(self.run_json, lambda path: path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))

    def update_run_json(self, **content: Any) -> None:
        self.write_run_json({**json.loads(self.run_json.read_text()), **content})

    @property
    def _state(self) -> dict[str, Any] | None:
        """The content of run.json; None if there is none, or one that we did not write."""
        try:
            content = json.loads(self.run_json.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) and "finished" in content else None

    @property
    def _occupied(self) -> bool:
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    def _same_run(self, config: RunConfig) -> bool:
        ours = config.model_dump(exclude={"existing_run"})
        try:
            return load_config([f"recipe={self.config}"]).model_dump(exclude={"existing_run"}) == ours
        except UserError:  # written by an older version, or damaged
            return False


def open_run(path: str | Path) -> tuple[RunFolder, RunConfig]:
    """A run on disk and its configuration. Raises UserError if the folder holds none."""
    folder = RunFolder(Path(path))
    if not folder.run_json.exists() or not folder.config.exists():
        raise fail("run", str(path), "is not a run folder (no run.json and config.yaml in it); runs are in outputs/")
    return folder, load_config([f"recipe={folder.config}"])


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` a temporary neighbour, then rename: the file is the old one, or the new one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class disk_errors:
    """Turn "no space left" and "not allowed" into a UserError that names the file and the space there is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = isinstance(error, OSError) and error.errno in codes
        # safetensors passes on the system's words, in an error type of its own
        full = full or any(os.strerror(code) in str(error) for code in codes)
        if full:
            place = next(parent for parent in (self.path, *self.path.parents) if parent.exists())
            free = shutil.disk_usage(place).free / 1e6
            raise fail(
                str(self.path), None, f"the disk is full ({free:.1f} MB free): what was there is kept; make room and run again"
            ) from error
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
            raise fail(str(self.path), None, f"may not be written ({error.strerror}): choose another place") from error


def environment() -> dict[str, Any]:
    """Versions, commit and machine, kept with every result."""
    packages = ("torch", "triton", "transformers", "accelerate", "peft", "datasets", "numpy")
    return {
        "flora_train": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name))},
        "machine": machine(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
    }


def _strict(value: Any) -> Any:
    """JSON has no NaN: a figure that is not finite is null."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def now() -> str:
    """ISO 8601, with the offset to UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=10)
    except OSError:
        return None
    return done.stdout.strip() or None
