"""A model or data set of the Hugging Face hub at one commit: its files, listed and downloaded with retries.

A revision is resolved to its commit once, and every file is read at that commit. Listings are kept in the
hub's cache beside the files, so that the same files are used without a network.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import TypeAdapter

from flora_train.config.errors import UserError, first_line
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.hub_client import (
    OFFLINE_HINT,
    DamagedFileError,
    explain,
    is_outage,
    with_retries,
)

logger = logging.getLogger(__name__)

RepoType = Literal["model", "dataset"]
MAIN = "main"
COMMIT = re.compile("[0-9a-f]{40}")
FIRST_ATTEMPTS = 2
"""Attempts of the first request to connect: where the hub cannot be reached, the error comes soon."""
LISTINGS = "flora_train"
"""Folder of the listings in a repository's part of the hub's cache."""

_commits: dict[str, str] = {}
"""Key of a repository and revision -> the commit that this process uses."""


class HubError(Exception):
    """Why a repository cannot be read, and what to do about it, as the end of a sentence that names it."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    path: str
    size: int
    sha256: str | None = None
    """Of an LFS file; None for a file that is kept in git."""


LISTING = TypeAdapter(list[HubFile])


def pin_commits(commits: Mapping[str, str]) -> None:
    """Use these commits: those that a run recorded, or that the main process resolved."""
    _commits.update(commits)


def forget_commits() -> None:
    """Resolve every revision again: for a new run in the same process."""
    _commits.clear()


def pinned_commits() -> dict[str, str]:
    """`models/ORG/NAME@REVISION` or `datasets/ORG/NAME@REVISION` -> commit, of all that was opened."""
    return dict(sorted(_commits.items()))


def pin_key(name: str, revision: str | None, repo_type: RepoType) -> str:
    return f"{repo_type}s/{name}@{revision or MAIN}"


def pinned_commit(name: str, revision: str | None, repo_type: RepoType) -> str | None:
    """The commit that this process uses for a revision; None if it was not resolved yet."""
    return _commits.get(pin_key(name, revision, repo_type))


def open_snapshot(name: str, revision: str | None, repo_type: RepoType) -> HubSnapshot:
    """A repository at the commit of a revision (None: the main branch). Raises HubError."""
    key = pin_key(name, revision, repo_type)
    if key not in _commits:
        _commits[key] = _resolve(name, revision, repo_type)
    return HubSnapshot(name, repo_type, _commits[key])


def is_offline() -> bool:
    """Whether the environment forbids requests to the hub."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def _resolve(name: str, revision: str | None, repo_type: RepoType) -> str:
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    reference = _cache_folder(name, repo_type) / "refs" / (revision or MAIN)
    cached = _read_commit(reference)
    if is_offline():
        if cached is None:
            raise HubError(f"is not in the local cache, and {OFFLINE_HINT}")
        return cached
    from huggingface_hub import HfApi

    def request() -> str:
        information = HfApi().repo_info(name, revision=revision, repo_type=repo_type)
        return str(information.sha)

    try:
        commit = with_retries(request, name, connect_attempts=FIRST_ATTEMPTS)
    except Exception as error:
        reason = explain(error, name, repo_type, revision)
        if cached is None or not is_outage(error):
            raise HubError(reason) from error
        logger.warning(f"{name}: {reason}. The local cache has its commit {cached[:12]}, which is used")
        return cached
    if commit == cached:
        return commit
    try:
        write_atomically(reference, lambda path: path.write_text(commit, encoding="utf-8"))
    except UserError as error:  # a cache that cannot be written to costs the next offline run, not this one
        logger.warning(f"the commit of {name} is not kept for offline use: {error}")
    return commit


def _read_commit(reference: Path) -> str | None:
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def _cache_folder(name: str, repo_type: RepoType) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "--".join([f"{repo_type}s", *name.split("/")])


@dataclass(frozen=True)
class HubSnapshot:
    """A repository at one commit."""

    name: str
    repo_type: RepoType
    commit: str

    @property
    def folder(self) -> Path:
        """The folder of its downloaded files."""
        return _cache_folder(self.name, self.repo_type) / "snapshots" / self.commit

    def files(self, below: str | None = None) -> list[HubFile]:
        """Its files in the order of their paths. below: only those of this folder and of the top folder.

        Raises HubError.
        """
        cached = self._cached_listing(below)
        if cached is not None:
            return cached
        if is_offline():
            return self._downloaded()
        try:
            files = with_retries(lambda: self._list(below), self.name)
        except Exception as error:
            if type(error).__name__ == "RemoteEntryNotFoundError":
                raise HubError(f"has no folder {below!r} at commit {self.commit[:12]}") from error
            raise HubError(explain(error, self.name, self.repo_type, self.commit)) from error
        listing = LISTING.dump_json(files, indent=1)
        try:
            write_atomically(self._listing(below), lambda path: path.write_bytes(listing))
        except UserError as error:
            logger.warning(f"the files of {self.name} are not listed for offline use: {error}")
        return files

    def download(self, file: HubFile) -> Path:
        """A file on this machine, from the cache or the hub. Raises HubError."""
        path = self.folder / file.path
        if path.is_file() and path.stat().st_size == file.size:
            return path
        if is_offline():
            raise HubError(f"its file {file.path} is not in the local cache, and {OFFLINE_HINT}")
        _remove(path)
        try:
            return with_retries(lambda: self._fetch(file), self.name)
        except Exception as error:
            raise HubError(explain(error, self.name, self.repo_type, self.commit)) from error

    def _list(self, below: str | None) -> list[HubFile]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        options: dict[str, Any] = {"revision": self.commit, "repo_type": self.repo_type}
        entries = list(HfApi().list_repo_tree(self.name, below, recursive=True, **options))
        if below is not None:
            entries += HfApi().list_repo_tree(self.name, **options)
        files: dict[str, HubFile] = {}
        for entry in entries:
            if isinstance(entry, RepoFile) and _is_inside(entry.path):
                digest = None
                if entry.lfs is not None:
                    digest = entry.lfs.sha256
                files[entry.path] = HubFile(entry.path, entry.size, digest)
        return [files[path] for path in sorted(files)]

    def _listing(self, below: str | None) -> Path:
        name = self.commit
        if below is not None:
            name += f"-{sha256(below.encode()).hexdigest()[:16]}"
        return _cache_folder(self.name, self.repo_type) / LISTINGS / f"{name}.json"

    def _cached_listing(self, below: str | None) -> list[HubFile] | None:
        """The listing that an earlier run left; None if there is none, or it is damaged."""
        try:
            return LISTING.validate_json(self._listing(below).read_bytes())
        except (OSError, ValueError):
            return None

    def _downloaded(self) -> list[HubFile]:
        """The files in the cache, for a cache that another program filled."""
        files = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                files.append(HubFile(path.relative_to(self.folder).as_posix(), path.stat().st_size))
        if not files:
            raise HubError(f"is not in the local cache, and {OFFLINE_HINT}")
        logger.warning(
            f"{self.name}: offline, so the {len(files)} files in the local cache are all its files"
        )
        return files

    def _fetch(self, file: HubFile) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(self.name, file.path, repo_type=self.repo_type, revision=self.commit))
        except RuntimeError as error:  # of the client for large files, for a connection that broke
            raise ConnectionError(first_line(error)) from error
        size = path.stat().st_size
        if size != file.size:
            _remove(path)
            raise DamagedFileError(f"{file.path} has {size:,} bytes instead of {file.size:,}")
        if file.sha256 is not None and _digest(path) != file.sha256:
            _remove(path)
            raise DamagedFileError(f"{file.path} has another content than its commit says")
        return path


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()


def _remove(path: Path) -> None:
    """Remove a file from the cache, with the blob that it links to; a user's own file behind a link stays."""
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs":
        target.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _is_inside(path: str) -> bool:
    """Whether a path stays in the folder that it is relative to."""
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts
