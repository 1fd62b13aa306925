"""Moves adapters between host and device ahead of the steps that need them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from math import inf

from flora_train.adapters.bank import AdapterBank
from flora_train.data.mixture import TaskMixture

LOOKAHEAD = 1000
"""Steps that are planned ahead. An adapter that none of them needs counts as never needed again."""


class AdapterPrefetcher:
    """Loads the adapters that the mixture will draw, up to the run's last step. Without paging it does
    nothing.

    Raises UserError if a step within LOOKAHEAD needs more adapters at once than the device has room for.
    """

    def __init__(self, bank: AdapterBank, mixture: TaskMixture, first_step: int, end: int) -> None:
        self.bank, self.mixture, self.end = bank, mixture, end
        self._uses: dict[int, deque[int]] = defaultdict(deque)
        self._planned = first_step
        self._plan_until(first_step)

    @contextmanager
    def resident(self, number: int, adapters: Collection[int]) -> Iterator[None]:
        """A context in which these adapters, of step `number`, are on the device; those of the next step are
        loaded meanwhile.
        """
        pager = self.bank.pager
        if pager is None:
            yield
            return
        self._plan_until(number)
        pager.make_resident(adapters, partial(self._next_use, number))
        if number + 1 < self.end:
            pager.prefetch(self._adapters(number + 1), partial(self._next_use, number + 1))
        try:
            yield
        finally:
            pager.resident = frozenset()

    def _adapters(self, number: int) -> set[int]:
        adapters: set[int] = set()
        for draw in self.mixture.step(number):
            adapters.update(self.bank.ids[name] for name in draw.adapters)
        return adapters

    def _plan_until(self, number: int) -> None:
        pager = self.bank.pager
        if pager is None:
            return
        while self._planned < min(number + LOOKAHEAD, self.end):
            adapters = self._adapters(self._planned)
            pager.check_room(adapters, f"step {self._planned + 1}")
            for adapter in adapters:
                self._uses[adapter].append(self._planned)
            self._planned += 1

    def _next_use(self, after: int, adapter: int) -> float:
        uses = self._uses[adapter]
        while uses and uses[0] < after:
            uses.popleft()
        return next((step for step in uses if step > after), inf)
