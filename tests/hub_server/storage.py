"""What the hub stores: repositories with their files in memory or in folders, branches, tags and commits."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.hub_server.faults import Fault, all_faults

TOKEN = "hf_secret"
"""The token of ME, who has access to every repository."""
STRANGER = "hf_stranger"
"""A valid token of a user who has accepted no terms and sees no private repository."""
ME, OTHERS = "me", "somebody"
MAIN = "main"
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".arrow", ".gz", ".tar", ".zip", ".mp3", ".wav")
LFS_SIZE = 10 << 20
"""Bytes above which any file is an LFS file."""

Content = bytes | Path
Tree = dict[str, Content]


@dataclass
class Repo:
    """A repository: a folder for each branch or tag, and what was pushed to main in memory above it."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    """Files of main that were pushed; they replace those of its folder."""
    commits: list[str] = field(default_factory=list)
    """Titles of the pushed commits."""
    gated: bool = False
    folders: dict[str, Path] = field(default_factory=dict)
    """Branch or tag -> the folder with its files."""
    history: dict[str, Tree] = field(default_factory=dict)
    """Commit -> its files, of all commits that anybody saw."""

    @property
    def head(self) -> str:
        return self.commit_of(MAIN)

    def tree(self, branch: str) -> Tree:
        """Path -> content, of a branch or tag as it is now."""
        tree: Tree = {}
        if (folder := self.folders.get(branch)) is not None:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    tree[path.relative_to(folder).as_posix()] = path
        if branch == MAIN:
            tree |= self.files
        return tree

    def commit_of(self, branch: str) -> str:
        """SHA of the branch's present commit."""
        tree = self.tree(branch)
        oids = [(path, git_oid(tree[path])) for path in sorted(tree)]
        commit = hashlib.sha1(repr(oids).encode()).hexdigest()
        self.history[commit] = tree
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag or (abbreviated) commit; None if there is none."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if name == MAIN or name in self.folders:
            return self.commit_of(name)
        for branch in self.branches:
            self.commit_of(branch)
        matching = [commit for commit in self.history if commit.startswith(revision)]
        return matching[0] if len(matching) == 1 and len(revision) >= 7 else None

    @property
    def branches(self) -> list[str]:
        return [MAIN, *(name for name in self.folders if name != MAIN)]


@dataclass
class Hub:
    """What is stored, and what was requested: (method, path)."""

    repos: dict[str, Repo] = field(default_factory=dict)
    """Name of a model, or `datasets/` + name of a data set -> repository."""
    lfs: dict[str, bytes] = field(default_factory=dict)
    collections: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[Any] = field(default_factory=list)
    """Fault, or [method, part of the path, answer, how many times more]: an answer is a status, "drop", which
    closes the connection without a word, or (status, content, headers)."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    """Kind of fault -> how many times it was injected."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Former key of a repository -> its key."""
    page_size: int = 1000
    """Entries of a page of a tree."""
    url: str = ""
    cdn_url: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add_folder(
        self,
        name: str,
        folder: Path | str,
        repo_type: str = "model",
        *,
        gated: bool = False,
        private: bool = False,
        revision: str = MAIN,
    ) -> Repo:
        """Serve the files of a folder as a branch or tag of a repository; they are read when requested."""
        repo = self.repos.setdefault(repo_key(name, repo_type), Repo(private))
        repo.gated = repo.gated or gated
        repo.folders[revision] = Path(folder)
        return repo

    def add_faults(self, *faults: Fault | str) -> None:
        """Inject these faults; `all`: every fault that a reader survives, gated repositories included."""
        for fault in faults:
            if fault == "all":
                self.faults += all_faults()
                for repo in self.repos.values():
                    repo.gated = True
            elif isinstance(fault, Fault):
                self.faults.append(fault)
            else:
                self.faults.append(Fault(fault))

    def rename(self, name: str, new_name: str, repo_type: str = "model") -> None:
        """Move a repository; its former name redirects to the new one."""
        self.repos[repo_key(new_name, repo_type)] = self.repos.pop(repo_key(name, repo_type))
        self.renamed[repo_key(name, repo_type)] = repo_key(new_name, repo_type)

    def commit(self, key: str, files: dict[str, bytes]) -> str:
        """Add a commit to main; earlier commits stay available. Returns its SHA."""
        repo = self.repos[key]
        repo.commit_of(MAIN)
        repo.files |= files
        repo.commits.append("changed")
        return repo.head


def repo_key(name: str, repo_type: str) -> str:
    return f"datasets/{name}" if repo_type == "dataset" else name


def size_of(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def read(content: Content, start: int = 0, end: int | None = None) -> bytes:
    """Bytes start..end of a file."""
    if isinstance(content, bytes):
        return content[start:end]
    with content.open("rb") as file:
        file.seek(start)
        return file.read() if end is None else file.read(end - start)


def is_lfs(path: str, content: Content) -> bool:
    return path.endswith(LFS_SUFFIXES) or size_of(content) > LFS_SIZE


def sha256(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return _file_hashes(content, *_version(content))[0]


def git_oid(content: Content) -> str:
    """Git's SHA-1 of a file."""
    if isinstance(content, bytes):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return _file_hashes(content, *_version(content))[1]


def etag(path: str, content: Content) -> str:
    """As the hub's: SHA-256 of LFS files, git's SHA-1 of others."""
    return sha256(content) if is_lfs(path, content) else git_oid(content)


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=100_000)
def _file_hashes(path: Path, size: int, modified: int) -> tuple[str, str]:
    sha, oid = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
            oid.update(block)
    return sha.hexdigest(), oid.hexdigest()


def entry(path: str, content: Content, *, expand: bool = False) -> dict[str, Any]:
    """A file as trees and paths-info list it."""
    size = size_of(content)
    about: dict[str, Any] = {"type": "file", "oid": git_oid(content), "size": size, "path": path}
    if is_lfs(path, content):
        about["lfs"] = {"oid": sha256(content), "size": size, "pointerSize": 130}
    if expand:
        about |= _expanded()
    return about


def folder_entry(path: str, *, expand: bool = False) -> dict[str, Any]:
    oid = hashlib.sha1(path.encode()).hexdigest()
    about: dict[str, Any] = {"type": "directory", "oid": oid, "size": 0, "path": path}
    return about | _expanded() if expand else about


def _expanded() -> dict[str, Any]:
    return {"lastCommit": {"id": "0" * 40, "title": "a commit", "date": "2026-01-01T00:00:00.000Z"}}


def to_json(content: Any) -> bytes:
    return json.dumps(content).encode()
