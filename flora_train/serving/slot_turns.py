"""SlotTurns: whose requests wait, so that an adapter without a slot is not starved by those that have one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class SlotTurns(Generic[Item]):
    """Counts what adapters in slots are given while a request waits for a slot.

    An adapter keeps its slot as long as it has running requests, so one that always has more would keep it
    for ever. After `lead`, its next requests wait until the one that waits has a slot.
    """

    def __init__(self, lead: float) -> None:
        self.lead = lead
        self.waiting: Item | None = None
        self._service: defaultdict[Hashable, float] = defaultdict(float)

    def wait(self, item: Item) -> None:
        """A request waits for a slot. Only the first counts, until it is done."""
        if self.waiting is None:
            self.waiting = item

    def done(self) -> None:
        """The request that waited has a slot, or has ended."""
        self.waiting = None
        self._service.clear()

    def serve(self, adapter: Hashable, service: float) -> None:
        """An adapter in a slot was given service."""
        if self.waiting is not None:
            self._service[adapter] += service

    def used_up(self, adapter: Hashable) -> bool:
        """Whether an adapter was given its lead."""
        return self.waiting is not None and self._service.get(adapter, 0.0) > self.lead
