"""Catalogues of adapters: run folders, folders of adapters, and hub repositories, from which an adapter is
fetched by its name."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from flora_train.adapters.peft_config import CONFIG, read_config
from flora_train.adapters.peft_tensors import WEIGHTS
from flora_train.adapters.routed.folder import ROUTING, is_routed_folder
from flora_train.config.errors import UserError, choices, did_you_mean, user_error
from flora_train.config.json_format import JsonValue, parse_object
from flora_train.config.paths import exists, find_file
from flora_train.runtime.hub_snapshot import HubFile, HubSnapshot, open_snapshot
from flora_train.runtime.manifest import BASE_RECORD
from flora_train.runtime.run_files import RunFiles

logger = logging.getLogger(__name__)

VARIABLE = "FLORA_TRAIN_CATALOGUE"
"""Environment variable: the sources of a server's catalogue, separated as in PATH."""
HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(@(?P<revision>[A-Za-z0-9._/-]+))?")
ROUTED_HINT = (
    "is a routed adapter (routing.json), and vLLM has no router that chooses its experts for each token: use "
    "flora-train chat with its run"
)
HUB_MANIFEST = "flora_train.json"
"""What `flora-train push` writes into a repository: its adapters and their names."""


class AdapterSource(Protocol):
    """Where adapters come from."""

    @property
    def label(self) -> str:
        """The source as its user wrote it."""

    def names(self) -> list[str]:
        """The names of its adapters, sorted. Raises HubError."""

    def fetch(self, name: str) -> Path:
        """The folder of an adapter of `names`. Raises HubError."""

    def describe(self, name: str) -> Path:
        """The folder of an adapter's configuration, perhaps without its tensors. Raises HubError."""

    def rank(self, name: str) -> int:
        """The largest rank that an adapter states; 1 where that cannot be read. Raises HubError."""

    def pinned(self) -> str:
        """The source with its commit or whole path, for another process. Raises HubError."""


@dataclass(frozen=True)
class FolderSource:
    """A folder with one folder for each adapter, such as outputs/RUN/adapters."""

    label: str
    root: Path

    def names(self) -> list[str]:
        return sorted(name for name in _entries(self.root) if is_adapter(self.root / name))

    def fetch(self, name: str) -> Path:
        return self.root / name

    describe = fetch

    def rank(self, name: str) -> int:
        return stated_rank(self.root / name)

    def pinned(self) -> str:
        return str(self.root.absolute())


@dataclass(frozen=True)
class SingleSource:
    """The folder of one adapter, which has the folder's name."""

    label: str
    folder: Path

    def names(self) -> list[str]:
        return [self.folder.resolve().name]

    def fetch(self, name: str) -> Path:
        return self.folder

    describe = fetch

    def rank(self, name: str) -> int:
        return stated_rank(self.folder)

    def pinned(self) -> str:
        return str(self.folder.absolute())


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub at one commit: adapters in its folders, or one at its top."""

    label: str
    repository: str
    revision: str | None = None

    @cached_property
    def snapshot(self) -> HubSnapshot:
        """The commit is that of the first access, for as long as the process runs."""
        snapshot = open_snapshot(self.repository, self.revision, "model")
        logger.info(f"{self.repository}: adapters of commit {snapshot.commit}")
        return snapshot

    @cached_property
    def _files(self) -> dict[str, dict[str, HubFile]]:
        """Adapter -> name of each of its files -> the file in the repository. The parts of a routed adapter
        are none."""
        folders: dict[str, dict[str, HubFile]] = {}
        if any(file.path == ROUTING for file in self.snapshot.files()):
            logger.warning(f"{self.repository} {ROUTED_HINT}")
            return {}
        for file in self.snapshot.files():
            folder, _, name = file.path.rpartition("/")
            if name in (CONFIG, BASE_RECORD, *WEIGHTS) and "/" not in folder:
                folders.setdefault(folder, {})[name] = file
        complete = {
            folder: files
            for folder, files in folders.items()
            if CONFIG in files and any(name in files for name in WEIGHTS)
        }
        if "" in complete:  # an adapter at the top is named by the manifest, or else by the repository
            name = self.repository.rpartition("/")[2]
            if len(self._manifest) == 1:
                name = next(iter(self._manifest))
            complete[name] = complete.pop("")
        return complete

    @cached_property
    def _manifest(self) -> Mapping[str, JsonValue]:
        """Adapter -> its entry in the manifest that `flora-train push` writes."""
        file = next((file for file in self.snapshot.files() if file.path == HUB_MANIFEST), None)
        if file is None:
            return {}
        try:
            adapters = parse_object(self.snapshot.download(file).read_bytes()).get("adapters")
        except (OSError, ValueError, RecursionError):
            return {}
        return adapters if isinstance(adapters, dict) else {}

    def names(self) -> list[str]:
        return sorted(self._files)

    def fetch(self, name: str) -> Path:
        """Downloads configuration, tensors and the base model's hash, and nothing else. Raises HubError."""
        files = self._files[name]
        weights = next(files[weights] for weights in WEIGHTS if weights in files)
        self.snapshot.download(weights)
        if BASE_RECORD in files:
            self.snapshot.download(files[BASE_RECORD])
        return self.describe(name)

    def describe(self, name: str) -> Path:
        return self.snapshot.download(self._files[name][CONFIG]).parent

    def rank(self, name: str) -> int:
        entry = self._manifest.get(name)
        if isinstance(entry, Mapping) and isinstance(rank := entry.get("rank"), int):
            return rank
        return stated_rank(self.describe(name))

    def pinned(self) -> str:
        return f"{self.repository}@{self.snapshot.commit}"


@dataclass(frozen=True)
class Catalogue:
    """The adapters of several sources. A name is only compared with those that the sources list: it never
    becomes a part of a path."""

    sources: Sequence[AdapterSource]

    def names(self) -> list[str]:
        """All names, sorted. Raises HubError."""
        return sorted({name for source in self.sources for name in source.names()})

    def fetch(self, name: str) -> Path | None:
        """The folder of the adapter of this name, or None if there is none. Raises HubError, and UserError if
        several sources have one."""
        having = [source for source in self.sources if name in source.names()]
        if len(having) > 1:
            labels = choices(source.label for source in having)
            raise user_error("model", name, f"is ambiguous: {labels} have an adapter of this name")
        return having[0].fetch(name) if having else None


def open_source(source: str, key: str) -> AdapterSource:
    """The source that a user names: a run folder, a folder of adapters or of one, or a hub repository
    ORG/NAME[@REVISION], which is not contacted yet. Raises UserError if it is none of them."""
    path = find_file(source)
    if exists(path):
        if not path.is_dir():
            raise user_error(key, source, "is a file: give a run folder, or a folder of adapters")
        files = RunFiles(path)
        if exists(files.run_json) and exists(files.config):
            return FolderSource(source, files.adapters)
        if is_adapter(path):
            return SingleSource(source, path)
        if is_routed_folder(path):
            raise user_error(key, source, ROUTED_HINT)
        folder = FolderSource(source, path)
        if not folder.names():
            if any(is_routed_folder(path / name) for name in _entries(path)):
                raise user_error(key, source, f"has routed adapters only; each {ROUTED_HINT}")
            hint = f"is neither a run folder nor a folder of adapters: no folder in it has {CONFIG}"
            raise user_error(key, source, hint)
        return folder
    match = HUB_NAME.fullmatch(source)
    if match is None or source.startswith(".") or exists(find_file(source.partition("/")[0])):
        hint = "there is no such folder; give a run folder, a folder of adapters, or ORG/NAME of the hub"
        raise user_error(key, source, hint)
    return HubSource(source, match["name"], match["revision"])


def open_catalogue(sources: str) -> Catalogue:
    """The catalogue that VARIABLE describes. Raises UserError for a source that does not exist."""
    names = [source for source in sources.split(os.pathsep) if source]
    if not names:
        raise user_error(VARIABLE, sources, "names no source")
    return Catalogue([open_source(source, VARIABLE) for source in names])


def choose(source: AdapterSource, names: Sequence[str]) -> list[str]:
    """These adapters of a source, or all. Raises UserError for an unknown name, and HubError."""
    known = source.names()
    for name in names:
        if name not in known:
            hint = f"{source.label} has no such adapter; there are {choices(known)}."
            raise user_error("adapter", name, f"{hint}{did_you_mean(name, known)}")
    return list(dict.fromkeys(names)) or known


def stated_rank(folder: Path) -> int:
    """The largest rank in the configuration of an adapter; 1 where it cannot be read."""
    try:
        config = read_config(str(folder), "adapter")
    except UserError:
        return 1
    return max([config.rank or 1, *config.rank_pattern.values()])


def is_adapter(folder: Path) -> bool:
    """Whether a folder has the configuration of an adapter."""
    return exists(folder / CONFIG)


def _entries(folder: Path) -> list[str]:
    """Names in a folder that a request can carry: visible ones, in valid Unicode."""
    try:
        names = os.listdir(folder)
    except OSError:  # it has vanished, or was never written
        return []
    return [name for name in names if not name.startswith(".") and _is_unicode(name)]


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def install() -> None:
    """Let vLLM's server fetch adapters of the catalogue that VARIABLE names. Without it, nothing changes.

    Raises UserError for a source that does not exist.
    """
    sources = os.environ.get(VARIABLE)
    if sources:
        catalogue = open_catalogue(sources)
        from flora_train.serving import resolver

        resolver.install(catalogue)
