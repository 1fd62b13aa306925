"""Which rows of a batch use which multiplicative adapter, and the rows that their ranks add.

Dimensions: T tokens of the batch, S slots of the device, R the largest rank of a slot, N added rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Index = Tensor | slice
"""Numbers as a LongTensor, or as a slice where they follow each other: indexing then copies nothing."""


@dataclass(frozen=True)
class RankGroup:
    """Tokens whose adapters have one rank on a layer, in the order of their slots."""

    tokens: Index
    """Positions in the batch, n of them."""
    slots: Index
    """The slot of each token."""
    count: int
    """n."""
    rank: int

    @property
    def rows(self) -> int:
        """Rows that the group adds: one for every rank of every token."""
        return self.count * self.rank


@dataclass(frozen=True)
class AddedRows:
    """The rows that ranks add, group by group: all ranks of a token follow each other."""

    groups: tuple[RankGroup, ...]

    @property
    def count(self) -> int:
        """N."""
        return sum(group.rows for group in self.groups)


@dataclass
class BatchRows:
    """The tokens of one batch that use multiplicative adapters. Shared by all layers for one step."""

    tokens_of: Mapping[int, tuple[int, ...]]
    """Slot -> positions of its tokens in the batch, ascending."""
    has_lora: bool
    """Whether other tokens use a LoRA."""
    device: torch.device
    _added: dict[tuple[tuple[int, int], ...], AddedRows | None] = field(default_factory=dict)
    _positions: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _parts: dict[tuple[int, ...], BatchRows] = field(default_factory=dict)

    def added(self, ranks: Sequence[tuple[int, int]]) -> AddedRows | None:
        """The rows that the ranks of these slots add; None where there are none.

        ranks: (slot, rank on the layer). Computed once per step for all layers of the same ranks.
        """
        key = tuple(ranks)
        if key not in self._added:
            self._added[key] = self._add(key)
        return self._added[key]

    def positions(self, slots: tuple[int, ...]) -> Tensor:
        """Positions of the tokens of these slots, slot by slot, LongTensor [n]."""
        if slots not in self._positions:
            tokens = [token for slot in slots for token in self.tokens_of[slot]]
            self._positions[slots] = torch.tensor(tokens, dtype=torch.long, device=self.device)
        return self._positions[slots]

    def slots_of_tokens(self, slots: tuple[int, ...]) -> Tensor:
        """The slot of each token of `positions`, LongTensor [n]."""
        key = (-1, *slots)
        if key not in self._positions:
            repeated = [slot for slot in slots for _ in self.tokens_of[slot]]
            self._positions[key] = torch.tensor(repeated, dtype=torch.long, device=self.device)
        return self._positions[key]

    def all_but(self, slots: tuple[int, ...], tokens: int) -> Tensor:
        """Positions of the tokens of a batch of this length that use none of these slots, LongTensor."""
        key = (-2, tokens, *slots)
        if key not in self._positions:
            taken = {token for slot in slots for token in self.tokens_of[slot]}
            others = [token for token in range(tokens) if token not in taken]
            self._positions[key] = torch.tensor(others, dtype=torch.long, device=self.device)
        return self._positions[key]

    def without(self, slots: tuple[int, ...], tokens: int) -> tuple[Tensor, BatchRows]:
        """`all_but` these slots [T - n], and the rows among them."""
        positions = self.all_but(slots, tokens)
        key = (tokens, *slots)
        if key not in self._parts:
            new = {token: number for number, token in enumerate(positions.tolist())}
            tokens_of = {
                slot: tuple(new[token] for token in its)
                for slot, its in self.tokens_of.items()
                if slot not in slots
            }
            self._parts[key] = BatchRows(tokens_of, self.has_lora, self.device)
        return positions, self._parts[key]

    def _add(self, ranks: tuple[tuple[int, int], ...]) -> AddedRows | None:
        by_rank: dict[int, list[tuple[int, int]]] = {}
        for slot, rank in ranks:
            if rank:
                by_rank.setdefault(rank, []).extend((slot, token) for token in self.tokens_of[slot])
        if not by_rank:
            return None
        groups = []
        for rank, pairs in sorted(by_rank.items()):
            pairs.sort()
            slots, tokens = (list(numbers) for numbers in zip(*pairs, strict=True))
            groups.append(RankGroup(self._index(tokens), self._index(slots), len(pairs), rank))
        return AddedRows(tuple(groups))

    def _index(self, numbers: list[int]) -> Index:
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return slice(numbers[0], numbers[0] + len(numbers))
        return torch.tensor(numbers, dtype=torch.long, device=self.device)
