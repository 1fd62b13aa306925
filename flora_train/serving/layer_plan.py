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
    near_one: bool = False
    """Whether the mean of a fLoRA's M is near 1 on every slice (`near_one` in kernels/flora/materialised.py),
    so that half precision loses least with W0 and W0 * (M - 1)."""

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
    """Tokens that are multiplied by W * M of their slot, on one slice, or by W * (M - 1) beside W."""

    positions: Index
    """Slot by slot, n of them."""
    slots: Tensor
    """Those slots, LongTensor."""
    rank: int
    """0: W itself."""
    offset: list[float]
    """Of each slot: 1 where the base model's product is added, else 0; less 1 for W * (M - 1)."""
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
    added: tuple[tuple[FormedGroup, ...], ...]
    """For each slice, tokens whose W * (M - 1) is formed. The base model's product is computed with the other
    tokens."""

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
    added: dict[int, SlotUse] = {}
    formed: dict[int, SlotUse] = {}
    device = rows.device.type
    for slot, use in used.items():
        beside_base = use.near_one and splits(dtype) and device == "cpu"
        if use.is_flora and forms_weight(
            max(use.ranks),
            len(rows.tokens_of[slot]),
            dtype,
            device,
            keep_base=all(use.keep_base),
            beside_base=beside_base,
        ):
            (added if beside_base else formed)[slot] = use
    rest = {slot: use for slot, use in used.items() if slot not in added and slot not in formed}
    deviations = tuple(_formed_groups(rows, added, s, subtracted=1.0) for s in range(slices))
    if not formed:
        parts = tuple(_slice_plan(rows, rest, s=s, tokens=tokens) for s in range(slices))
        return LayerPlan(parts, None, ((),) * slices, None, deviations)
    others = rows.without(list(formed), tokens)
    positions = rows.all_but(list(formed), tokens)
    return LayerPlan(
        tuple(_slice_plan(others, rest, s=s, tokens=len(positions)) for s in range(slices)),
        positions,
        tuple(_formed_groups(rows, formed, s) for s in range(slices)),
        rows.positions(list(formed)),
        deviations,
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


def _formed_groups(
    rows: BatchRows, formed: dict[int, SlotUse], s: int, subtracted: float = 0.0
) -> tuple[FormedGroup, ...]:
    by_rank: dict[int, list[int]] = {}
    for slot in sorted(formed, key=lambda slot: rows.tokens_of[slot]):  # tokens of a prompt stay neighbours
        if formed[slot].ranks[s] or not subtracted:
            by_rank.setdefault(formed[slot].ranks[s], []).append(slot)
    groups = []
    for rank, slots in by_rank.items():
        bounds = accumulate((len(rows.tokens_of[slot]) for slot in slots), initial=0)
        positions = rows.index([token for slot in slots for token in rows.tokens_of[slot]])
        offset = [formed[slot].keep_base[s] - subtracted for slot in slots]
        groups.append(FormedGroup(positions, rows.numbers(slots), rank, offset, Segments(tuple(bounds))))
    return tuple(groups)


CPU_EXPANDING, CPU_FORMING = 1.4, 75
"""Costs on a CPU, in tokens through W: of a row for a rank of a token, with the products around it, and of
forming W * M of one adapter (benchmarks/results/serving_layer_cpu.md)."""


@lru_cache(maxsize=4096)
def forms_weight(
    rank: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    *,
    keep_base: bool = True,
    beside_base: bool = False,
) -> bool:
    """Whether W * M is formed for this many tokens of one adapter, because that costs less than one more row
    for each rank of each token. Costs are in tokens through W.

    keep_base: whether the tokens have a row of the base model where no weight is formed; beside_base: whether
    they have one where W * (M - 1) is formed. GPUs form weights as in training.
    """
    if device == "cpu":
        expanded = (keep_base + CPU_EXPANDING * rank) * tokens
        return expanded > (1 + beside_base) * tokens + CPU_FORMING
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
