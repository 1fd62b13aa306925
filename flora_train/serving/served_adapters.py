"""Which copy of its folder an adapter is served from: kept for as long as a request may need it."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flora_train.serving.snapshots import SnapshotStore, stamps_of

GRACE = 60.0
"""Seconds for which a copy stays after its last request. A request that ended for its client may still run
for a step."""


OTHER_CONTENT = re.compile(r"@[0-9a-f]{8}$")
"""The end of the name under which the engine knows a later content of an adapter."""


def client_name(name: str) -> str:
    """The client's name of an adapter of the engine."""
    return OTHER_CONTENT.sub("", name)


@dataclass(frozen=True)
class AdapterKey:
    """How a client names an adapter."""

    name: str
    int_id: int
    path: str


@dataclass(frozen=True)
class ServedAdapter:
    """What the engine gets instead of the client's adapter."""

    name: str
    """The client's name; with a part of the content's hash behind it if an adapter of this name and other
    content was served before."""
    int_id: int
    path: str
    """Of the copy."""
    source: Path
    """The folder that was copied."""
    stamps: dict[str, tuple[int, ...]]
    """Of the files in `source`, before they were copied."""

    @property
    def source_has_changed(self) -> bool:
        return stamps_of(self.source) != self.stamps


class ServedAdapters:
    """The adapters of one engine. Contents are never mixed: each has an id, a path and a name of its own."""

    def __init__(self, store: SnapshotStore, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self._clock = clock
        self._served: dict[AdapterKey, ServedAdapter] = {}
        self._first_path: dict[str, str] = {}
        self._in_admission: Counter[str] = Counter()
        self._unneeded_since: dict[str, float] = {}
        self._next_check = 0.0

    def get(self, key: AdapterKey) -> ServedAdapter | None:
        """What the adapter is served as; None if it was not admitted."""
        return self._served.get(key)

    def copy(self, key: AdapterKey, source: Path, *, salt: str = "") -> ServedAdapter:
        """Copy the adapter's folder and check it. It is served once it is admitted. Raises UserError."""
        stamps = stamps_of(source)
        snapshot = self.store.take(source, key.name, salt=salt)
        name, path = key.name, str(snapshot.folder)
        if self._first_path.get(name, path) != path:
            name = f"{name}@{snapshot.digest[:8]}"
        return ServedAdapter(name, snapshot.int_id, path, source, stamps)

    def admit(self, key: AdapterKey, served: ServedAdapter) -> None:
        """From now on, requests for `key` get this, and those for another path of its name and id nothing."""
        self._first_path.setdefault(key.name, served.path)
        others = [other for other in self._served if (other.name, other.int_id) == (key.name, key.int_id)]
        for other in others:
            del self._served[other]
        self._served[key] = served

    def serves(self, served: ServedAdapter) -> bool:
        """Whether an adapter of this content is admitted."""
        return any(other.int_id == served.int_id for other in self._served.values())

    def forget(self, *, name: str | None = None, int_id: int | None = None) -> list[ServedAdapter]:
        """Serve the adapters of this name or id no longer. Returns what they were served as."""
        keys = [key for key in self._served if key.name == name or key.int_id == int_id]
        return [self._served.pop(key) for key in keys]

    def client_ids(self, int_ids: Iterable[int]) -> set[int]:
        """The ids by which clients know adapters of the engine."""
        names: dict[int, set[int]] = {int_id: set() for int_id in int_ids}
        for key, served in self._served.items():
            if served.int_id in names:
                names[served.int_id].add(key.int_id)
        return set().union(*(known or {int_id} for int_id, known in names.items()))

    def engine_ids(self, int_id: int) -> list[int]:
        """The ids by which the engine knows a client's adapter."""
        ids = [served.int_id for key, served in self._served.items() if key.int_id == int_id]
        return ids or [int_id]

    @contextmanager
    def in_admission(self, served: ServedAdapter) -> Iterator[None]:
        """A context in which the copy stays: the engine does not know a request of it yet."""
        self._in_admission[served.path] += 1
        try:
            yield
        finally:
            self._in_admission[served.path] -= 1
            if not self._in_admission[served.path]:
                del self._in_admission[served.path]

    def keep(self, served: ServedAdapter) -> None:
        """Keep the copy until the engine ends."""
        self._in_admission[served.path] += 1

    def delete_unneeded(self, running: Iterable[str]) -> None:
        """Delete the copies that no client can name and no request has needed for a while.

        running: the paths of unfinished requests.
        """
        now = self._clock()
        if now < self._next_check:
            return
        self._next_check = now + GRACE / 2
        needed = {served.path for served in self._served.values()}
        needed.update(running, self._in_admission)
        for folder in self.store.folders():
            path = str(folder)
            if path in needed:
                self._unneeded_since.pop(path, None)
            elif now - self._unneeded_since.setdefault(path, now) > GRACE:
                del self._unneeded_since[path]
                self.store.drop(folder, age=GRACE)
