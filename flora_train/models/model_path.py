"""Whether model.path is a local folder or a name on the hub, and how a missing folder is built."""

from __future__ import annotations

from pathlib import Path

from flora_train.config.errors import Problem
from flora_train.config.paths import IS_CHECKOUT, PROJECT_ROOT, exists, find_file

BUILDERS = {
    "minilm-l6": "build_minilm.py",
    "smollm2-135m": "build_smollm2.py",
    "whisper-base": "build_whisper.py",
}
"""Folder of a model -> the script in assets/ that builds it."""


def is_local(path: str) -> bool:
    """Whether model.path is a folder on this machine."""
    return exists(find_file(path))


def missing_folder(path: str) -> Problem | None:
    """The problem of a path that cannot be a name on the hub, and is no folder here."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if not looks_local or is_local(path):
        return None
    return Problem("model.path", path, f"no such folder{how_to_build(path)}")


def how_to_build(path: str) -> str:
    """The command that builds a model of this package, for the end of a sentence."""
    builder = BUILDERS.get(Path(path).name)
    if builder is None:
        return ""
    script = f"assets/{builder}" if IS_CHECKOUT else f"{PROJECT_ROOT / 'assets' / builder} --output {path}"
    return f"; build it with: python {script}"
