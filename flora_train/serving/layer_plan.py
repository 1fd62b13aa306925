"""How one layer computes a batch: which rows are multiplied by its weight, and whose weights are formed.

A plan depends on the batch and on what the slots do on the layer, not on numbers: layers that agree share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from flora_train.kernels.backend import MAX_TRITON_RANK, is_triton, splits
from flora_train.kernels.flora.cost_model import Work, thresholds_for
from flora_train.kernels.segments import Segments
from flora_train.serving.batch_rows import BatchRows, Index


@dataclass(frozen=True)
class SlotUse:
    """What the adapter in a slot does on one layer."""

    ranks: tuple[int, ...]
    """Rank on each slice of the outputs; 0 where the slice is not adapted."""
    keep_base: tuple[bool, ...]
    """Whether the base model's product is added, for each slice."""
    scales: tuple[str, ...]
    """What an IA3 scales on each slice, 'input' or 'output'; '' for a fLoRA and where it is not adapted."""

    @property
    def is_flora(self) -> bool:
        return not any(self.scales)


@dataclass(frozen=True)
class Scaled:
    """Tokens whose inputs or outputs an IA3 scales."""

    positions: Tensor
    """LongTensor [n]."""
    slots: Tensor
    """The slot of each, LongTensor [n]."""


@dataclass(frozen=True)
class RankGroup:
    """Tokens whose adapters have one rank on a slice, in the order of their slots: one row is added for each
    rank of each token, and all ranks of a token follow each other."""

    tokens: Index
    """Positions, n of them."""
    slots: Index
    """The slot of each token."""
    count: int
    """n."""
    rank: int

    @property
    def rows(self) -> int:
        return self.count * self.rank


@dataclass(frozen=True)
class SlicePlan:
    """The rows that are multiplied by one slice of the weight."""

    scaled_inputs: Scaled | None
    groups: tuple[RankGroup, ...]
    """Added rows."""
    kept: Tensor | None
    """Positions of the tokens that have a row of their own, because the base model's product is part of their
    result; None: all."""
    scaled_outputs: Scaled | None

    @property
    def added(self) -> int:
        """Number of added rows."""
        return sum(group.rows for group in self.groups)

    @property
    def changes(self) -> bool:
        """Whether other rows than those of the base model are multiplied."""
        return self.scaled_inputs is not None or bool(self.groups)


@dataclass(frozen=True)
class FormedGroup:
    """Tokens that are multiplied by W * M of their slot, on one slice."""

    positions: Tensor
    """Slot by slot, LongTensor [n]."""
    slots: Tensor
    """Those slots, LongTensor."""
    rank: int
    """0: W itself."""
    offset: list[float]
    """Of each slot: 1 where the base model's product is added, else 0."""
    segments: Segments


@dataclass(frozen=True)
class LayerPlan:
    """How one layer computes a batch."""

    slices: tuple[SlicePlan, ...]
    """For the tokens of `expanded`, numbered among themselves."""
    expanded: Tensor | None
    """Positions of the tokens of which no weight is formed, LongTensor; None: all."""
    formed: tuple[tuple[FormedGroup, ...], ...]
    """For each slice."""
    formed_tokens: Tensor | None
    """Positions of the tokens of `formed`; None: there are none."""

    @property
    def by_slice(self) -> bool:
        """Whether the slices are multiplied one by one, because their rows differ."""
        return len(self.slices) > 1 and any(part.changes for part in self.slices)


def plan_layer(
    rows: BatchRows, uses: Mapping[int, SlotUse], *, slices: int, tokens: int, dtype: torch.dtype
) -> LayerPlan:
    """The plan of a layer whose slots are used in this way.

    uses: slot -> its use, where the layer is adapted; slices: of the layer's outputs; tokens: T.
    """
    used = {slot: uses[slot] for slot in rows.tokens_of if slot in uses}
    key = (tokens, dtype, slices, tuple(used.items()))
    return rows.cached(key, lambda: _plan(rows, used, slices=slices, tokens=tokens, dtype=dtype))


def _plan(
    rows: BatchRows, used: dict[int, SlotUse], *, slices: int, tokens: int, dtype: torch.dtype
) -> LayerPlan:
    formed = {
        slot: use
        for slot, use in used.items()
        if use.is_flora and forms_weight(max(use.ranks), len(rows.tokens_of[slot]), dtype, rows.device.type)
    }
    rest = {slot: use for slot, use in used.items() if slot not in formed}
    if not formed:
        parts = tuple(_slice_plan(rows, rest, s=s, tokens=tokens) for s in range(slices))
        return LayerPlan(parts, None, ((),) * slices, None)
    others = rows.without(list(formed), tokens)
    positions = rows.all_but(list(formed), tokens)
    return LayerPlan(
        tuple(_slice_plan(others, rest, s=s, tokens=len(positions)) for s in range(slices)),
        positions,
        tuple(_formed_groups(rows, formed, s) for s in range(slices)),
        rows.positions(list(formed)),
    )


def _slice_plan(rows: BatchRows, used: dict[int, SlotUse], *, s: int, tokens: int) -> SlicePlan:
    floras = {slot: use for slot, use in used.items() if use.is_flora}
    dropped = [slot for slot, use in floras.items() if not use.keep_base[s]]
    by_rank: dict[int, list[tuple[int, int]]] = {}
    for slot, use in floras.items():
        if use.ranks[s]:
            by_rank.setdefault(use.ranks[s], []).extend((slot, token) for token in rows.tokens_of[slot])
    groups = []
    for rank, pairs in sorted(by_rank.items()):
        slots, positions = zip(*sorted(pairs), strict=True)
        groups.append(RankGroup(rows.index(list(positions)), rows.index(list(slots)), len(pairs), rank))
    return SlicePlan(
        _scaled(rows, used, s, "input"),
        tuple(groups),
        rows.all_but(dropped, tokens) if dropped else None,
        _scaled(rows, used, s, "output"),
    )


def _scaled(rows: BatchRows, used: dict[int, SlotUse], s: int, what: str) -> Scaled | None:
    slots = [slot for slot, use in used.items() if use.scales[s] == what]
    return Scaled(rows.positions(slots), rows.slots_of_tokens(slots)) if slots else None


def _formed_groups(rows: BatchRows, formed: dict[int, SlotUse], s: int) -> tuple[FormedGroup, ...]:
    by_rank: dict[int, list[int]] = {}
    for slot, use in formed.items():
        by_rank.setdefault(use.ranks[s], []).append(slot)
    groups = []
    for rank, slots in by_rank.items():
        bounds = accumulate((len(rows.tokens_of[slot]) for slot in slots), initial=0)
        offset = [float(formed[slot].keep_base[s]) for slot in slots]
        groups.append(
            FormedGroup(rows.positions(slots), rows.numbers(slots), rank, offset, Segments(tuple(bounds)))
        )
    return tuple(groups)


@lru_cache(maxsize=4096)
def forms_weight(rank: int, tokens: int, dtype: torch.dtype, device: str) -> bool:
    """Whether W * M is formed for this many tokens of one adapter, because that costs less than one more row
    for each rank of each token. Costs are in tokens through W."""
    work = Work(
        rank=rank,
        residual=True,
        tokens=tokens,
        segments=1,
        in_features=1,
        out_features=1,
        bytes_each=dtype.itemsize,
        split=splits(dtype),
        device=device,
        triton=device == "cuda" and is_triton() and rank <= MAX_TRITON_RANK,
    )
    thresholds = thresholds_for(work)
    expanding = rank * tokens * thresholds.expanding / 100
    return expanding > thresholds.forming + thresholds.forming_a_rank * rank + work.split * tokens
