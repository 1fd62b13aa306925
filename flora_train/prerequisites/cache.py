"""What is in the caches of the hub's clients, without asking the hub."""

from __future__ import annotations

import re
from pathlib import Path

from flora_train.models.base_identity import weight_files, weights_are_complete
from flora_train.prerequisites.needs import Need
from flora_train.runtime.hub_probe import OPEN_FILES, Repository


def cached_model(repository: Repository) -> Path | None:
    """The folder of a model that is in the cache with all its weights."""
    folder = _snapshot(repository)
    if folder is None or not weights_are_complete(folder):
        return None
    return folder


def not_cached(need: Need) -> Need | None:
    """What a run could not read without the hub, as far as the cache shows it; None if it could read all."""
    repository = need.repository
    folder = _snapshot(repository)
    if repository.type == "dataset":
        return need.without(lambda name: _has_files(folder, name))
    if repository.file == "config.json":
        is_cached = cached_model(repository) is not None
    else:
        is_cached = folder is not None and bool(weight_files(folder))
    return None if is_cached else need


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


def _has_files(snapshot: Path | None, folder: str) -> bool:
    """Whether a snapshot has a file of rows below a folder."""
    if snapshot is None:
        return False
    return any(path.is_file() and path.name not in OPEN_FILES for path in (snapshot / folder).rglob("*"))
