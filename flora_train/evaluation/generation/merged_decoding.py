"""Decides, while rows are decoded, when the only adapter of a batch is merged into the weights."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager

import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.host_memory import free_memory
from flora_train.adapters.merged import MergedWeights, merge_layer, routed_merged
from flora_train.adapters.spec import BASE_ID
from flora_train.evaluation.generation.merge_costs import LayerCosts, measure_layers
from flora_train.evaluation.generation.requests import Row
from flora_train.evaluation.generation.switched_decoding import SwitchedDecoding, SwitchPath
from flora_train.runtime.hardware import free_host_memory

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Share of the free memory that merged weights may take; the rest is left to keys, values and others."""
LENGTHS_REMEMBERED = 256
"""Rows that have ended, from whose lengths the rest of others is expected."""


class MergedDecoding:
    """Merged weights for batches of one adapter of a bank.

    A layer is merged when it is expected to save more time, in the steps until rows of another adapter are
    read in, than merging takes; both are measured, for the number of rows in the batch. The frozen weights
    stay as they are: a batch of other rows uses them without a change. One row of a switch adapter is decoded
    by `switch_path` (switched_decoding.py).
    """

    def __init__(self, bank: AdapterBank, *, switch_path: SwitchPath = "auto") -> None:
        self.bank = bank
        self.switched = SwitchedDecoding(bank, switch_path, self._free_bytes)
        self.merged: MergedWeights | None = None
        self._costs: dict[tuple[int, int], list[LayerCosts]] = {}
        self._lengths: deque[int] = deque(maxlen=LENGTHS_REMEMBERED)
        self._complete: int | None = None
        """The adapter of which every layer that can be merged is merged."""

    def routed(self, adapters: Sequence[int]) -> AbstractContextManager[None]:
        """A context in which the model applies these adapters: merged where they are one that is merged."""
        if self.merged is not None and self.merged.layers and set(adapters) == {self.merged.adapter}:
            return routed_merged(self.bank, adapters, self.merged)
        if self.switched.applies_to(adapters):
            return self.switched.routed(adapters[0])
        return self.bank.routed(adapters)

    def note_length(self, tokens: int) -> None:
        """Remember the length of a row that has ended."""
        self._lengths.append(tokens)

    def expected_tokens(self, done: int, limit: int) -> float:
        """Tokens expected of a row that has generated `done` of at most `limit`.

        They are the mean of what rows that became longer had still to come; where there was none, the row is
        expected to go on for as long as it has.
        """
        rests = [length - done for length in self._lengths if length > done]
        expected = float(done)
        if rests:
            expected = sum(rests) / len(rests)
        return min(expected, limit - done)

    def prepare(
        self,
        live: Sequence[Row],
        waiting: Iterable[Sequence[Row]],
        *,
        limit: int,
        max_rows: int,
        admit_at: int,
    ) -> None:
        """Merge what is cheaper merged in the coming steps.

        live: rows of the next step. waiting: groups of rows that are read in later. limit: largest number of
        tokens of a row. max_rows: rows of a batch. admit_at: rows in the batch at which others are read in.
        """
        adapters = {row.adapter for row in live}
        adapter = live[0].adapter
        if len(adapters) > 1 or adapter == BASE_ID or adapter == self._complete:
            return
        if not self.bank.location[adapter][0].method.merges:
            return
        rests = sorted(self.expected_tokens(len(row.tokens), limit) for row in live)
        if all(group[0].adapter == adapter for group in waiting):
            later = sum(len(group) for group in waiting) * self.expected_tokens(0, limit)
            steps = rests[-1] + later / max_rows
        elif len(live) > admit_at:
            # Rows of other adapters are read in after so many of these have ended.
            steps = rests[len(live) - admit_at - 1]
        else:
            steps = 0.0
        if steps >= 1:
            self._merge(adapter, len(live), steps)

    def release(self) -> None:
        """Free the merged weights."""
        self.merged, self._complete = None, None
        self.switched.release()

    @torch.no_grad()
    def _merge(self, adapter: int, rows: int, steps: float) -> None:
        """Merge the layers for which that saves time in so many steps of this many rows."""
        costs = self._costs_of(adapter, rows)
        if self.merged is None or self.merged.adapter != adapter:
            self.release()
            merged = MergedWeights(adapter)
        else:
            merged = self.merged
        if not costs:
            self._complete = adapter
        modules = worthwhile(costs, steps, budget=self._free_bytes(), merged=merged.layers)
        if not modules:
            return
        with self.bank.routed([adapter]):
            for module in modules:
                merged.layers[module] = merge_layer(self.bank, adapter, module)
        self.merged = merged
        if len(merged.layers) == sum(len(cost.modules) for cost in costs):
            self._complete = adapter
        logger.debug(f"{self.bank.specs[adapter].name}: {len(modules)} layers merged for decoding")

    def _costs_of(self, adapter: int, rows: int) -> list[LayerCosts]:
        """The costs for this many rows, measured once for each power of 2."""
        rows = 1 << (rows - 1).bit_length()
        pool, _ = self.bank.location[adapter]
        key = id(pool), rows
        if key not in self._costs:
            self._costs[key] = measure_layers(self.bank, adapter, rows)
        return self._costs[key]

    def _free_bytes(self) -> int:
        """Memory for further merged weights."""
        device = self.bank.device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return int(MEMORY_SHARE * (free + unused))
        return int(MEMORY_SHARE * min(free_memory(), free_host_memory()))


def worthwhile(
    costs: Iterable[LayerCosts], steps: float, *, budget: int, merged: Collection[str]
) -> list[str]:
    """The layers, without those that are merged already, whose merging saves time within `steps`.

    Those that save most for their memory come first, as many as fit into `budget` bytes.
    """
    gains = []
    for cost in costs:
        gain = steps * cost.saved_seconds - cost.merge_seconds
        if gain > 0:
            gains.append((gain / cost.bytes, cost))
    gains.sort(key=lambda item: -item[0])
    modules = []
    for _, cost in gains:
        for module in cost.modules:
            if module not in merged and cost.bytes <= budget:
                modules.append(module)
                budget -= cost.bytes
    return modules
