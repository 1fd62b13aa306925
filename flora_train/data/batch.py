"""Padded batches of the rows of a step: grouped by length, ordered by adapter, distributed over processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora_train.config.embedding_schema import Pooling
from flora_train.data.embeddings.split import EmbeddingSplit
from flora_train.data.labels.spec import Target
from flora_train.data.labels.split import LabelSplit
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
    document: int = 0
    """Of a preference: 0 for the chosen or only completion, 1 for the rejected one. Of a pair or triplet of
    texts: 0 for the anchor, 1 for the positive, 2 for the negative."""
    unit: int | None = None
    """Number, within its step, of the rows that a loss couples: a pair, or a draw. None: no other row."""
    draw: int | None = None
    """Number, within its step, of the draw that the load of its adapter's router is balanced over; None for
    other adapters."""
    frozen: bool = False
    """Whether it gets no gradient: rows of the reference, and rows that the KL term of KTO is computed
    from."""
    completion_of: int | None = None
    """The example whose completion follows this example's prompt, for the KL term. None: its own."""

    @property
    def tokens(self) -> int:
        """Tokens without the positions of the encoder."""
        return self.length - self.window


@dataclass(frozen=True)
class MixedBatch:
    """A micro-batch as tensors."""

    inputs: Mapping[str, Tensor]
    """Arguments of the model. Causal models: input_ids and attention_mask (or position_ids, see `collate`),
    int64 [B, T], right-padded. With labelled texts also token_type_ids, where some are not 0."""
    labels: Tensor
    """int64 [B, T], IGNORE at prompts and padding."""
    adapter_ids: Tensor
    """int64 [B], non-decreasing."""
    rows: tuple[Row, ...]
    clips: Tensor | None = None
    """int64 [B]: index of each row's clip in the inputs, if these hold every clip once."""
    targets: Sequence[Target | None] | None = None
    """What each row of a labelled text is labelled with (see `LabelSplit.target`), None for other rows; None
    if there is no labelled text."""
    poolings: Sequence[Pooling | None] | None = None
    """How the embedding of each row is made, None for rows without; None if no row has one."""

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

    Rows that a loss couples stay together, as do those of a draw that a router is balanced over. Those of the
    reference are in every micro-batch that compares an adapter with them, once for all its adapters. What is
    longer than `max_tokens` gets a micro-batch of its own. Rows of different encoder windows are not mixed,
    so that no clip is padded because of another; neither are rows that share an encoding and rows that do
    not.
    """
    groups: list[_Group] = []
    for unit in _coupled(rows):
        if not groups or not groups[-1].has_room(unit, max_tokens):
            groups.append(_Group())
        groups[-1].add(unit)
    return [sorted(group.rows, key=lambda row: row.adapter) for group in groups]


@dataclass(frozen=True)
class _Unit:
    """Rows that enter a micro-batch together."""

    rows: tuple[Row, ...]
    reference: tuple[Row, ...] = ()
    """Rows of the base that these are compared with, which other adapters share."""

    @property
    def encoding(self) -> tuple[int, bool]:
        return -self.rows[0].window, self.rows[0].shares_encoding

    @property
    def longest(self) -> int:
        return max(row.length for row in (*self.rows, *self.reference))

    @property
    def order(self) -> tuple[Any, ...]:
        first = self.rows[0]
        return (*self.encoding, -self.longest, first.task, first.example, first.unit or 0, first.adapter)


class _Group:
    """A micro-batch that is filled with units, the longest first."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.longest = 0
        self._references: set[tuple[str, int | None]] = set()
        self._encoding: tuple[int, bool] | None = None

    def has_room(self, unit: _Unit, max_tokens: int) -> bool:
        count = len(self.rows) + len(self._added(unit))
        return self._encoding == unit.encoding and self.longest * count <= max_tokens

    def add(self, unit: _Unit) -> None:
        self.rows += self._added(unit)
        self.longest = max(self.longest, unit.longest)
        self._encoding = unit.encoding
        if unit.reference:
            self._references.add((unit.rows[0].task, unit.rows[0].unit))

    def _added(self, unit: _Unit) -> tuple[Row, ...]:
        """The rows of a unit that are not in the micro-batch yet."""
        if (unit.rows[0].task, unit.rows[0].unit) in self._references:
            return unit.rows
        return (*unit.rows, *unit.reference)


def _coupled(rows: Sequence[Row]) -> list[_Unit]:
    """The units of rows, the longest first."""
    units: list[_Unit] = []
    coupled: dict[tuple[str, int, int], list[Row]] = {}
    draws: dict[tuple[str, int, int], list[Row]] = {}
    references: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.unit is None and row.draw is not None:
            draws.setdefault((row.task, row.draw, row.adapter), []).append(row)
        elif row.unit is None:
            units.append(_Unit((row,)))
        elif row.adapter < 0:
            references.setdefault((row.task, row.unit), []).append(row)
        else:
            coupled.setdefault((row.task, row.unit, row.adapter), []).append(row)
    units += [_Unit(tuple(members)) for members in draws.values()]
    for (task, unit, _), members in coupled.items():
        units.append(_Unit(tuple(members), tuple(references.get((task, unit), ()))))
    return sorted(units, key=lambda unit: unit.order)


def padded_tokens(rows: Sequence[Row]) -> int:
    """Positions that a micro-batch of these rows computes, including padding and the encoder."""
    return len(rows) * max((row.length for row in rows), default=0)


def share_of_rank(groups: Sequence[Sequence[Row]], rank: int, processes: int) -> list[list[Row]]:
    """The micro-batches of one process, dealt out from the longest to the shortest, back and forth."""
    deal = [*range(processes), *reversed(range(processes))]
    return [list(group) for i, group in enumerate(groups) if deal[i % len(deal)] == rank]


def collate(rows: Sequence[Row], split_of: Callable[[str], TokenSplit], pad_token: int) -> MixedBatch:
    """The tensors of rows for a causal model. split_of: task -> its tokens.

    Where an example holds several documents, the batch has position_ids that restart at every document (and
    at the padding) instead of a mask, from which transformers keeps documents from attending to each other.
    Labelled texts are never packed, so that a batch of them has a mask: the last token of a row is the last
    one that its mask has.
    """
    length = max(row.length for row in rows)
    input_ids = np.full((len(rows), length), pad_token, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
    positions = np.empty((len(rows), length), dtype=np.int64)
    packed = False
    for i, row in enumerate(rows):
        documents = split_of(row.task).sequence(row.example, row.document, row.completion_of)
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
    types = _token_types(rows, split_of, length)
    if types is not None:
        inputs["token_type_ids"] = torch.from_numpy(types)
    ids = torch.tensor([row.adapter for row in rows])
    return MixedBatch(
        inputs,
        torch.from_numpy(labels),
        ids,
        tuple(rows),
        targets=targets_of(rows, split_of),
        poolings=poolings_of(rows, split_of),
    )


def poolings_of(
    rows: Sequence[Row], split_of: Callable[[str], TokenSplit]
) -> tuple[Pooling | None, ...] | None:
    """How the embedding of each row is made; None if no row has one."""
    poolings: list[Pooling | None] = []
    for row in rows:
        split = split_of(row.task)
        pooling = None
        if isinstance(split, EmbeddingSplit):
            pooling = split.spec.pooling
        poolings.append(pooling)
    if all(pooling is None for pooling in poolings):
        return None
    return tuple(poolings)


def targets_of(
    rows: Sequence[Row], split_of: Callable[[str], TokenSplit]
) -> tuple[Target | None, ...] | None:
    """What each row is labelled with; None if no row is a labelled text."""
    targets: list[Target | None] = []
    for row in rows:
        split = split_of(row.task)
        target = None
        if isinstance(split, LabelSplit):
            target = split.target(row.example)
        targets.append(target)
    if all(target is None for target in targets):
        return None
    return tuple(targets)


def _token_types(
    rows: Sequence[Row], split_of: Callable[[str], TokenSplit], length: int
) -> NDArray[np.int64] | None:
    """The token types of labelled texts, 0 in other rows and padding; None if all are 0, which is what a
    model takes them for without this argument."""
    types = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        split = split_of(row.task)
        of_row = split.types(row.example) if isinstance(split, LabelSplit) else None
        if of_row is not None:
            types[i, : len(of_row)] = of_row
    return types if types.any() else None
