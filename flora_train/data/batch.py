"""How do a step's rows become padded batches? Grouped by length, ordered by adapter, shared out to processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flora_train.data.tokenization import TokenSplit

IGNORE = -100
"""The label of positions that are not learnt (torch's cross_entropy ignores it)."""


@dataclass(frozen=True)
class Row:
    """One example for one adapter. adapter: id in the bank, -1 the base model; length: what it costs, in tokens and encoder
    positions; window: those encoder positions, 0 for text; shares_encoding: its adapter leaves the encoder as it is; seed: of the
    noise that its input gets, None for no noise."""

    adapter: int
    task: str
    example: int
    length: int
    window: int = 0
    shares_encoding: bool = False
    seed: int | None = None

    @property
    def tokens(self) -> int:
        """Without the encoder's."""
        return self.length - self.window


@dataclass(frozen=True)
class MixedBatch:
    """inputs: what the model is called with; of a causal model input_ids and attention_mask (or position_ids, see `collate`),
    int64 [B, L], right-padded;
    labels: int64 [B, L], IGNORE at prompt and padding; adapter_ids: int64 [B], non-decreasing; rows: what each row is;
    clips: int64 [B], where inputs hold features of different clips once: which of them a row hears."""

    inputs: Mapping[str, Tensor]
    labels: Tensor
    adapter_ids: Tensor
    rows: tuple[Row, ...]
    clips: Tensor | None = None

    @property
    def padded_tokens(self) -> int:
        """Positions that are computed, padding and the encoder's included."""
        return self.labels.numel() + sum(row.window for row in self.rows)

    def to(self, device: torch.device) -> MixedBatch:
        """The same batch with its tensors on `device`."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        labels, ids = (tensor.to(device, non_blocking=True) for tensor in (self.labels, self.adapter_ids))
        clips = None if self.clips is None else self.clips.to(device, non_blocking=True)
        return replace(self, inputs=inputs, labels=labels, adapter_ids=ids, clips=clips)


Collate = Callable[[Sequence[Row], Callable[[str], TokenSplit], int], MixedBatch]
"""(rows, task -> its tokens, padding token) -> a batch. What a batch holds is the model's business: `collate` for causal ones."""


def prefetch(collate: Collate, rows: Sequence[Row], split_of: Callable[[str], TokenSplit]) -> None:
    """Tell a `collate` that can prepare rows in the background which ones come next."""
    start: Callable[..., None] | None = getattr(collate, "prefetch", None)
    if start is not None:
        start(rows, split_of)


def group_by_length(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Micro-batches of at most `max_tokens` padded tokens, similar lengths together, each ordered by adapter.

    A pure function of the rows. Single rows longer than `max_tokens` get a micro-batch of their own. Rows of different encoder
    windows stay apart, so that no clip is padded because of another; so do rows that share an encoding and those that do not.
    """

    def kind(row: Row) -> tuple[int, bool]:
        return -row.window, row.shares_encoding

    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (*kind(row), -row.length, row.task, row.example, row.adapter)):
        fits = groups and groups[-1][0].length * (len(groups[-1]) + 1) <= max_tokens
        if fits and kind(groups[-1][0]) == kind(row):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group, key=lambda row: row.adapter) for group in groups]


def share_of_rank(groups: Sequence[Sequence[Row]], rank: int, processes: int) -> list[list[Row]]:
    """One process's micro-batches: dealt out from the longest to the shortest, back and forth."""
    deal = [*range(processes), *reversed(range(processes))]
    return [list(group) for i, group in enumerate(groups) if deal[i % len(deal)] == rank]


def collate(rows: Sequence[Row], split_of: Callable[[str], TokenSplit], pad_token: int) -> MixedBatch:
    """Rows -> tensors for a causal model. `split_of(task)` holds the tokens.

    Where an example holds several documents, the batch has position_ids that restart at every document (and at the padding)
    instead of a mask, from which transformers keeps documents from attending to each other.
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
        for tokens, prompt in documents:
            end = start + len(tokens)
            input_ids[i, start:end] = tokens
            positions[i, start:end] = np.arange(len(tokens))
            learnt = start + max(prompt, 1)
            labels[i, learnt:end] = input_ids[i, learnt:end]
            start = end
        mask[i, :start] = 1
        positions[i, start:] = np.arange(length - start)
    ids = torch.tensor([row.adapter for row in rows])
    where = {"position_ids": positions} if packed else {"attention_mask": mask}
    inputs = {name: torch.from_numpy(array) for name, array in {"input_ids": input_ids, **where}.items()}
    return MixedBatch(inputs, torch.from_numpy(labels), ids, tuple(rows))
