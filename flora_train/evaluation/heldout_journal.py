"""HeldoutJournal: held-out losses of a final evaluation, so that it can be resumed after a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.config.json_format import JsonObject, JsonValue
from flora_train.data.batch import Row
from flora_train.runtime.atomic import disk_errors
from flora_train.runtime.distributed import on_main_process, world
from flora_train.runtime.journal import Journal
from flora_train.training.preference_rows import RowKey, row_key


@dataclass(frozen=True)
class LoggedBatch:
    """Losses of a batch, which is identified by its first row."""

    task: str
    adapter: int
    example: int
    losses: list[float]
    """Nats per row, summed over its tokens with a loss."""
    part: int = 0
    """The part of a preference that the row stands for."""

    @property
    def key(self) -> RowKey:
        return self.task, self.adapter, self.example, self.part


class HeldoutJournal:
    """The journal of held-out losses in a folder of a run.

    Losses of other adapters, rows or batches than requested are deleted: they are of an earlier evaluation.
    """

    def __init__(self, path: Path, bank: AdapterBank, data: Mapping[str, str]) -> None:
        """data: task -> SHA-256 of its rows."""
        self.bank, self.data = bank, data
        self.log = Journal(path, LoggedBatch, "piece", "delete it")

    def known(self, batches: Sequence[Sequence[Row]]) -> dict[RowKey, list[float]]:
        """The losses in the journal. batches: those of all processes.

        Collective: the main process reads, so that all processes know the same losses, and share the same
        batches, even if one of them has written before another one asks.
        """
        settings: JsonObject = {
            "adapters": self._adapters_sha(),
            "data": dict(self.data),
            "batches": sha256(repr(batches).encode()).hexdigest(),
        }
        losses: dict[RowKey, list[float]] = on_main_process(lambda: self._claimed(settings))
        self.writer = self.log.writer(world()[0])
        return losses

    def add(self, batch: Sequence[Row], losses: Sequence[float]) -> None:
        """Append the losses of a batch."""
        task, adapter, example, part = row_key(batch[0])
        self.writer.append(LoggedBatch(task, adapter, example, list(losses), part))

    def delete(self) -> None:
        """Delete the journal. Called once the report is written."""
        with disk_errors(self.log.path):
            self.log.delete()

    def _claimed(self, settings: Mapping[str, JsonValue]) -> dict[RowKey, list[float]]:
        """Reserve the folder, and return the losses in it."""
        try:
            self.log.claim(settings)
            entries = self.log.read()
        except UserError:
            self.delete()
            self.log.claim(settings)
            entries = {}
        return {key: entry.losses for key, entry in entries.items()}

    def _adapters_sha(self) -> str:
        digests = [self.bank.digest(adapter) for adapter in range(len(self.bank.specs))]
        return sha256(json.dumps(digests).encode()).hexdigest()
