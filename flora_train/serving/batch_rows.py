"""Which rows of a batch use which multiplicative adapter, and the rows that their ranks add.

Dimensions: T tokens of the batch, S slots of the device, R the largest rank of a slot, N added rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class RankGroup:
    """Tokens whose adapters have one rank on a layer."""

    tokens: Tensor | slice
    """Positions in the batch, LongTensor [n], or the slice of them where they follow each other."""
    count: int
    """n."""
    rank: int


@dataclass(frozen=True)
class AddedRows:
    """One row for every rank of every token, in groups: all ranks of a token follow each other."""

    tokens: Tensor
    """The token of each row, LongTensor [N]."""
    factors: Tensor
    """The row of the slots' factors [S * R, features], LongTensor [N]."""
    groups: tuple[RankGroup, ...]


@dataclass
class BatchRows:
    """The tokens of one batch that use multiplicative adapters. Shared by all layers for one step."""

    tokens_of: Mapping[int, tuple[int, ...]]
    """Slot -> positions of its tokens in the batch, ascending."""
    has_lora: bool
    """Whether other tokens use a LoRA."""
    slot_rank: int
    """R."""
    device: torch.device
    _added: dict[tuple[tuple[int, int], ...], AddedRows | None] = field(default_factory=dict)
    _positions: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _parts: dict[tuple[int, ...], tuple[Tensor, BatchRows]] = field(default_factory=dict)

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

    def without(self, slots: tuple[int, ...], tokens: int) -> tuple[Tensor, BatchRows]:
        """The other tokens of a batch of this length: their positions [T - n], and the rows among them."""
        key = (tokens, *slots)
        if key not in self._parts:
            taken = {token for slot in slots for token in self.tokens_of[slot]}
            others = [token for token in range(tokens) if token not in taken]
            new = {token: number for number, token in enumerate(others)}
            tokens_of = {
                slot: tuple(new[token] for token in its)
                for slot, its in self.tokens_of.items()
                if slot not in slots
            }
            positions = torch.tensor(others, dtype=torch.long, device=self.device)
            self._parts[key] = positions, BatchRows(tokens_of, self.has_lora, self.slot_rank, self.device)
        return self._parts[key]

    def _add(self, ranks: tuple[tuple[int, int], ...]) -> AddedRows | None:
        by_rank: dict[int, list[tuple[int, int]]] = {}
        for slot, rank in ranks:
            if rank:
                by_rank.setdefault(rank, []).extend((token, slot) for token in self.tokens_of[slot])
        if not by_rank:
            return None
        tokens: list[int] = []
        factors: list[int] = []
        groups = []
        for rank, pairs in sorted(by_rank.items()):
            pairs.sort()
            for token, slot in pairs:
                tokens += [token] * rank
                factors += range(slot * self.slot_rank, slot * self.slot_rank + rank)
            groups.append(RankGroup(self._group([token for token, _ in pairs]), len(pairs), rank))
        return AddedRows(
            torch.tensor(tokens, dtype=torch.long, device=self.device),
            torch.tensor(factors, dtype=torch.long, device=self.device),
            tuple(groups),
        )

    def _group(self, tokens: list[int]) -> Tensor | slice:
        if tokens[-1] - tokens[0] + 1 == len(tokens):
            return slice(tokens[0], tokens[-1] + 1)
        return torch.tensor(tokens, dtype=torch.long, device=self.device)
