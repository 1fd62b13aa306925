"""HeldoutJournal: the results of rows in a final evaluation, so that it can be resumed after a kill."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.config.json_format import JsonObject, JsonValue
from flora_train.data.batch import Row
from flora_train.runtime.atomic import disk_errors
from flora_train.runtime.distributed import on_main_process, world
from flora_train.runtime.journal import Journal
from flora_train.training.preference_rows import RowKey, row_key
from flora_train.training.result_log import BatchResults


@dataclass(frozen=True)
class LoggedBatch:
    """Results of a batch, which is identified by its first row. Numbers are base64 of their bytes: JSON has
    no NaN."""

    task: str
    adapter: int
    example: int
    losses: str
    """float64: the loss of each row, summed over its tokens."""
    outputs: list[str]
    """float32, of each row: the outputs of its head, or its embedding."""
    part: int = 0
    """The part of an example that the row stands for."""

    @property
    def key(self) -> RowKey:
        return self.task, self.adapter, self.example, self.part

    @property
    def results(self) -> BatchResults:
        """Raises ValueError if the numbers are damaged."""
        losses = np.frombuffer(b64decode(self.losses, validate=True), "<f8").tolist()
        return BatchResults(losses, [_floats(text) for text in self.outputs])


class HeldoutJournal:
    """The journal of held-out losses, outputs of heads, scores of words and embeddings in a folder of a run.

    Results of other adapters, rows or batches than requested are deleted: they are of an earlier evaluation.
    """

    def __init__(
        self,
        path: Path,
        bank: AdapterBank,
        data: Mapping[str, str],
        adapters_sha: Callable[[], str] | None = None,
    ) -> None:
        """data: task -> SHA-256 of its rows; adapters_sha: of the bank's parameters."""
        self.bank, self.data = bank, data
        self.adapters_sha = adapters_sha or cache(partial(_sha_of_adapters, bank))
        self.log = Journal(path, LoggedBatch, "piece", "delete it")

    def known(self, batches: Sequence[Sequence[Row]]) -> dict[RowKey, BatchResults]:
        """The results in the journal. batches: those of all processes.

        Collective: the main process reads, so that all processes know the same results, and share the same
        batches, even if one of them has written before another one asks.
        """
        settings: JsonObject = {
            "adapters": self.adapters_sha(),
            "data": dict(self.data),
            "batches": sha256(repr(batches).encode()).hexdigest(),
        }
        results: dict[RowKey, BatchResults] = on_main_process(lambda: self._claimed(settings))
        self.writer = self.log.writer(world()[0])
        return results

    def add(self, batch: Sequence[Row], results: BatchResults) -> None:
        """Append the results of a batch."""
        task, adapter, example, part = row_key(batch[0])
        losses = b64encode(np.asarray(results.losses, "<f8").tobytes()).decode()
        outputs = [b64encode(values.astype("<f4").tobytes()).decode() for values in results.outputs]
        self.writer.append(LoggedBatch(task, adapter, example, losses, outputs, part))

    def part(self, name: str) -> HeldoutJournal:
        """A journal for other batches, in a folder of this one."""
        return HeldoutJournal(self.log.path / name, self.bank, self.data, self.adapters_sha)

    def delete(self) -> None:
        """Delete the journal and its parts. Called once the report is written."""
        with disk_errors(self.log.path):
            for folder in self.log.path.glob("*"):
                if folder.is_dir():
                    Journal(folder, LoggedBatch, "piece", "delete it").delete()
            self.log.delete()

    def _claimed(self, settings: Mapping[str, JsonValue]) -> dict[RowKey, BatchResults]:
        """Reserve the folder, and return the results in it."""
        try:
            self.log.claim(settings)
            return {key: entry.results for key, entry in self.log.read().items()}
        except (UserError, ValueError):
            self.delete()
            self.log.claim(settings)
            return {}


def _sha_of_adapters(bank: AdapterBank) -> str:
    digests = [bank.digest(adapter) for adapter in range(len(bank.specs))]
    return sha256(json.dumps(digests).encode()).hexdigest()


def _floats(text: str) -> NDArray[np.float32]:
    return np.frombuffer(b64decode(text, validate=True), "<f4").astype(np.float32)
