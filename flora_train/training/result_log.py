"""ResultLog: keeps what rows were evaluated to, so that a killed evaluation can be resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flora_train.data.batch import Row
from flora_train.training.preference_rows import RowKey


@dataclass(frozen=True)
class BatchResults:
    """What the rows of a batch were evaluated to."""

    losses: Sequence[float] = ()
    outputs: Sequence[NDArray[np.float32]] = ()
    """Of each row the outputs of its head, or its embedding, flat; empty if it has none."""


class ResultLog(Protocol):
    """The key of a batch is that of its first row: see `row_key`."""

    def known(self, batches: Sequence[Sequence[Row]]) -> Mapping[RowKey, BatchResults]:
        """The results of those of all processes' batches that were evaluated before. Collective."""
        ...

    def add(self, batch: Sequence[Row], results: BatchResults) -> None:
        """Keep the results of a batch."""
        ...

    def part(self, name: str) -> ResultLog:
        """A log for other batches, which is deleted with this one."""
        ...
