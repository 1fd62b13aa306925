"""Which adapters must be on the device for a step, and which for the next? As the mixture foretells, where there is paging."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from math import inf

from flora_train.adapters.bank import AdapterBank
from flora_train.data.mixture import TaskMixture

AHEAD = 1000
"""Steps that are looked ahead: what is not needed within them counts as not needed at all."""


class AdapterPrefetcher:
    """Moves the bank's adapters by what the mixture will draw, up to the run's last step. Without paging it does nothing.

    Raises UserError if a step of the next AHEAD needs more adapters at one time than the device has room for.
    """

    def __init__(self, bank: AdapterBank, mixture: TaskMixture, begin: int, steps: int) -> None:
        self.bank, self.mixture, self.steps = bank, mixture, steps
        self._uses: dict[int, deque[int]] = defaultdict(deque)
        self._known = begin
        self._look(begin)

    @contextmanager
    def held(self, number: int, adapters: Collection[int]) -> Iterator[None]:
        """Within it these adapters, of step `number`, are on the device, and those of the next are brought while it computes."""
        pager = self.bank.pager
        if pager is None:
            yield
            return
        self._look(number)
        pager.make_resident(adapters, partial(self._next_use, number))
        if number + 1 < self.steps:
            pager.prefetch(self._adapters(number + 1), partial(self._next_use, number + 1))
        try:
            yield
        finally:
            pager.resident = frozenset()

    def _adapters(self, number: int) -> set[int]:
        return {self.bank.ids[name] for draw in self.mixture.step(number) for name in draw.adapters}

    def _look(self, number: int) -> None:
        pager = self.bank.pager
        while pager is not None and self._known < min(number + AHEAD, self.steps):
            adapters = self._adapters(self._known)
            pager.check_room(adapters, f"step {self._known + 1}")
            for adapter in adapters:
                self._uses[adapter].append(self._known)
            self._known += 1

    def _next_use(self, after: int, adapter: int) -> float:
        uses = self._uses[adapter]
        while uses and uses[0] < after:
            uses.popleft()
        return next((step for step in uses if step > after), inf)
