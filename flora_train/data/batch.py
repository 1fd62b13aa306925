"""Padded batches of the rows of a step: grouped by length, ordered by adapter, distributed over processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flora_train.data.token_split import TokenSplit

IGNORE = -100
"""The label of positions that are not learnt, which cross_entropy ignores."""


@dataclass(frozen=True)
class Row:
    """One example for one adapter."""

    adapter: int
    """Id in the bank, -1 for the base model."""
    task: str
    example: int
    length: int
    """Cost in tokens and encoder positions."""
    window: int = 0
    """Encoder positions, 0 for text."""
    shares_encoding: bool = False
    """Whether its adapter does not change the encoder."""
    seed: int | None = None
    """Seed of the noise that the input gets, None for no noise."""

    @property
    def tokens(self) -> int:
        """Tokens without the positions of the encoder."""
        return self.length - self.window


@dataclass(frozen=True)
class MixedBatch:
    """A micro-batch as tensors."""

    inputs: Mapping[str, Tensor]
    """Arguments of the model. Causal models: input_ids and attention_mask (or position_ids, see `collate`),
    int64 [B, T], right-padded."""
    labels: Tensor
    """int64 [B, T], IGNORE at prompts and padding."""
    adapter_ids: Tensor
    """int64 [B], non-decreasing."""
    rows: tuple[Row, ...]
    clips: Tensor | None = None
    """int64 [B]: index of each row's clip in the inputs, if these hold every clip once."""

    @property
    def padded_tokens(self) -> int:
        """Positions that are computed, including padding and the encoder."""
        return self.labels.numel() + sum(row.window for row in self.rows)

    def to(self, device: torch.device) -> MixedBatch:
        """The same batch with its tensors on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            inputs={name: move(tensor) for name, tensor in self.inputs.items()},
            labels=move(self.labels),
            adapter_ids=move(self.adapter_ids),
            clips=None if self.clips is None else move(self.clips),
        )


Collate = Callable[[Sequence[Row], Callable[[str], TokenSplit], int], MixedBatch]
"""(rows, task -> its tokens, padding token) -> a batch. `collate` makes batches for causal models."""


def prefetch(collate: Collate, rows: Sequence[Row], split_of: Callable[[str], TokenSplit]) -> None:
    """Announce the next rows to a `collate` that prepares rows in the background."""
    start: Callable[..., None] | None = getattr(collate, "prefetch", None)
    if start is not None:
        start(rows, split_of)


def group_by_length(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Micro-batches of at most `max_tokens` padded tokens, with similar lengths together, each ordered by
    adapter.

    A row that is longer than `max_tokens` gets a micro-batch of its own. Rows of different encoder windows
    are not mixed, so that no clip is padded because of another; neither are rows that share an encoding and
    rows that do not.
    """

    def encoding(row: Row) -> tuple[int, bool]:
        return -row.window, row.shares_encoding

    def order(row: Row) -> tuple[Any, ...]:
        return (*encoding(row), -row.length, row.task, row.example, row.adapter)

    groups: list[list[Row]] = []
    for row in sorted(rows, key=order):
        fits = groups and groups[-1][0].length * (len(groups[-1]) + 1) <= max_tokens
        if fits and encoding(groups[-1][0]) == encoding(row):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group, key=lambda row: row.adapter) for group in groups]


def share_of_rank(groups: Sequence[Sequence[Row]], rank: int, processes: int) -> list[list[Row]]:
    """The micro-batches of one process, dealt out from the longest to the shortest, back and forth."""
    deal = [*range(processes), *reversed(range(processes))]
    return [list(group) for i, group in enumerate(groups) if deal[i % len(deal)] == rank]


def collate(rows: Sequence[Row], split_of: Callable[[str], TokenSplit], pad_token: int) -> MixedBatch:
    """The tensors of rows for a causal model. split_of: task -> its tokens.

    Where an example holds several documents, the batch has position_ids that restart at every document (and
    at the padding) instead of a mask, from which transformers keeps documents from attending to each other.
    """
    length = max(row.length for row in rows)
    input_ids = np.full((len(rows), length), pad_token, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
    positions = np.empty((len(rows), length), dtype=np.int64)
    packed = False
    for i, row in enumerate(rows):
        documents = split_of(row.task).documents(row.example)
        packed |= len(documents) > 1
        start = 0
        for tokens, spans in documents:
            end = start + len(tokens)
            input_ids[i, start:end] = tokens
            positions[i, start:end] = np.arange(len(tokens))
            for begin, stop in spans + start:
                labels[i, begin:stop] = input_ids[i, begin:stop]
            start = end
        mask[i, :start] = 1
        positions[i, start:] = np.arange(length - start)
    inputs = {"input_ids": torch.from_numpy(input_ids)}
    if packed:
        inputs["position_ids"] = torch.from_numpy(positions)
    else:
        inputs["attention_mask"] = torch.from_numpy(mask)
    ids = torch.tensor([row.adapter for row in rows])
    return MixedBatch(inputs, torch.from_numpy(labels), ids, tuple(rows))
