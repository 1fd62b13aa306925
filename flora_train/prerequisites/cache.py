"""What is in the caches of the hub's clients, without asking the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from flora_train.models.base_identity import weight_files, weights_are_complete
from flora_train.runtime.hub_probe import OPEN_FILES, Repository


def cached_model(repository: Repository) -> Path | None:
    """The folder of a model that is in the cache with all its weights."""
    folder = _snapshot(repository)
    if folder is None or not weights_are_complete(folder):
        return None
    return folder


def is_cached(repository: Repository) -> bool:
    """Whether a run could read the repository without the hub, as far as the cache shows it."""
    if repository.type == "dataset":
        return _has_files(_snapshot(repository)) or _is_prepared(repository.name)
    if repository.file == "config.json":
        return cached_model(repository) is not None
    folder = _snapshot(repository)
    return folder is not None and bool(weight_files(folder))


def _snapshot(repository: Repository) -> Path | None:
    """The folder of the repository's revision in the hub's cache."""
    from huggingface_hub import constants

    name = repository.name.replace("/", "--")
    folder = Path(constants.HF_HUB_CACHE) / f"{repository.type}s--{name}"
    revision = repository.revision or "main"
    try:
        commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = revision
    snapshot = folder / "snapshots" / commit
    if re.fullmatch(r"[\w.-]+", commit) and snapshot.is_dir():
        return snapshot
    return None


def _has_files(folder: Path | None) -> bool:
    """Whether a snapshot has a file of rows."""
    if folder is None:
        return False
    return any(path.is_file() and path.name not in OPEN_FILES for path in folder.rglob("*"))


def _is_prepared(name: str) -> bool:
    """Whether datasets has rows of the data set in its own cache."""
    wanted = _plain(name.replace("/", "___"))
    return any(_plain(folder.name) == wanted for folder in _prepared_folders())


def _prepared_folders() -> Iterator[Path]:
    from huggingface_hub import constants

    cache = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    folder = Path(cache).expanduser()
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_dir())


def _plain(name: str) -> str:
    """A name as datasets writes it, without what differs between its versions: case and single _."""
    return "/".join(part.replace("_", "") for part in name.lower().split("___"))
