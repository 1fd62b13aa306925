"""Which tokens of a batch use which multiplicative adapter."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

Index = Tensor | slice
"""Numbers as a LongTensor, or as a slice where they follow each other: indexing then copies nothing."""
T = TypeVar("T")


@dataclass(eq=False)
class BatchRows:
    """The tokens of one batch that use multiplicative adapters. All layers share it while the batch stays the
    same."""

    tokens_of: Mapping[int, tuple[int, ...]]
    """Slot -> positions of its tokens in the batch, ascending."""
    has_lora: bool
    """Whether other tokens use a LoRA."""
    device: torch.device
    _cached: dict[Hashable, object] = field(default_factory=dict)

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for this key before, or the new result of `make`. Layers that use the slots alike
        share it."""
        if key not in self._cached:
            self._cached[key] = make()
        return self._cached[key]  # type: ignore[return-value]

    def positions(self, slots: Sequence[int]) -> Tensor:
        """Positions of the tokens of these slots, slot by slot, LongTensor."""
        return self.numbers([token for slot in slots for token in self.tokens_of[slot]])

    def slots_of_tokens(self, slots: Sequence[int]) -> Tensor:
        """The slot of each token of `positions`, LongTensor."""
        return self.numbers([slot for slot in slots for _ in self.tokens_of[slot]])

    def all_but(self, slots: Sequence[int], tokens: int) -> Tensor:
        """Positions of the tokens of a batch of this length that use none of these slots, LongTensor."""
        return self.numbers(self._others(slots, tokens))

    def without(self, slots: Sequence[int], tokens: int) -> BatchRows:
        """The rows among `all_but` these slots, whose tokens are numbered anew."""
        new = {token: number for number, token in enumerate(self._others(slots, tokens))}
        others = {slot: its for slot, its in self.tokens_of.items() if slot not in slots}
        tokens_of = {slot: tuple(new[token] for token in its) for slot, its in others.items()}
        return BatchRows(tokens_of, self.has_lora, self.device)

    def index(self, numbers: list[int]) -> Index:
        """The numbers as an index."""
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return slice(numbers[0], numbers[0] + len(numbers))
        return self.numbers(numbers)

    def _others(self, slots: Sequence[int], tokens: int) -> list[int]:
        taken = {token for slot in slots for token in self.tokens_of[slot]}
        return [token for token in range(tokens) if token not in taken]

    def numbers(self, numbers: list[int]) -> Tensor:
        """The numbers as a LongTensor on the device."""
        return torch.tensor(numbers, dtype=torch.long, device=self.device)
