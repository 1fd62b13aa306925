"""Decides which adapter is merged into the base model while requests of many adapters are served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Adapter = int | None
"""The id of an adapter; None: the base model."""
PATIENCE_FACTOR = 2
"""Factor of the patience after a switch that did not pay."""


@dataclass(frozen=True)
class MergeCosts:
    """Measured seconds. A row is a token of a step."""

    merge_seconds: float
    unmerge_seconds: float
    saved_per_step: float
    """Saved in a step with rows of the merged adapter, whatever their number."""
    saved_per_row: float
    """Saved for each row of the merged adapter."""
    foreign_per_step: float
    """Added in a step with rows of other adapters or the base model, whatever their number."""
    foreign_per_row: float
    """Added for each of these rows."""

    @property
    def round_trip(self) -> float:
        return self.merge_seconds + self.unmerge_seconds

    def gain(self, own: int, foreign: int) -> float:
        """Seconds that a step of so many rows takes less with the adapter of `own` rows merged."""
        gain = 0.0
        if own:
            gain += self.saved_per_step + own * self.saved_per_row
        if foreign:
            gain -= self.foreign_per_step + foreign * self.foreign_per_row
        return gain


class MergePolicy:
    """Follows the rows of every step, and says which adapter should be merged.

    A step runs rows of all adapters, whichever is merged: no row is ever excluded, and no row waits but for
    a switch itself. A switch is made when another choice would have saved, since the last switch, `patience`
    times what merging and unmerging take. The patience doubles after a switch that did not pay, and is halved
    (to no less than 1) after one that clearly did: a mix that changes all the time ends in few switches.

    However patient, an adapter stays merged at a loss for at most `max_requests` of its requests.
    """

    def __init__(self, costs_of: Callable[[int], MergeCosts], *, max_requests: int) -> None:
        """costs_of: the present measurements for an adapter."""
        self.costs_of, self.max_requests = costs_of, max_requests
        self.merged: Adapter = None
        self.patience = 1
        self.switches = 0
        self._regrets: dict[Adapter, float] = {}
        """Choice -> what it would have saved; None is to merge nothing."""
        self._previous: Adapter = None
        self._benefit = 0.0
        """Seconds saved since the last switch by having made it."""
        self._overtaken = 0
        """Requests of the merged adapter that have started since it is merged at a loss."""

    def step(self, rows: Mapping[Adapter, int], started: Mapping[Adapter, int] | None = None) -> Adapter:
        """The adapter that should be merged from this step on; None: none.

        Args:
            rows: Rows of each adapter in the step.
            started: Requests of each adapter that are in a step for the first time.
        """
        total = sum(rows.values())
        if not total:
            return self.merged
        current = self._gain(self.merged, rows, total)
        self._benefit += current - self._gain(self._previous, rows, total)
        self._add_regrets(rows, total, current)
        self._count_overtaken(current, started or {})
        possible = [choice for choice in self._regrets if choice is None or rows.get(choice)]
        best = max(possible, key=lambda choice: self._regrets[choice], default=self.merged)
        if self._overtaken > self.max_requests:
            self._switch(None)
        elif best != self.merged:
            seconds = self._switching_seconds(self.merged, best)
            if self._regrets[best] > self.patience * seconds:
                self._switch(best)
        return self.merged

    def forget(self) -> None:
        """Nothing is merged any more: the adapter was unloaded."""
        self.merged, self._previous = None, None
        self._regrets.clear()
        self._benefit, self._overtaken = 0.0, 0

    def _gain(self, choice: Adapter, rows: Mapping[Adapter, int], total: int) -> float:
        if choice is None:
            return 0.0
        own = rows.get(choice, 0)
        return self.costs_of(choice).gain(own, total - own)

    def _add_regrets(self, rows: Mapping[Adapter, int], total: int, current: float) -> None:
        choices = {None, *rows, *self._regrets} - {self.merged}
        for choice in choices:
            regret = self._regrets.get(choice, 0.0) + self._gain(choice, rows, total) - current
            if regret > 0:
                self._regrets[choice] = regret
            else:
                self._regrets.pop(choice, None)

    def _count_overtaken(self, current: float, started: Mapping[Adapter, int]) -> None:
        if self.merged is None or current >= 0:
            self._overtaken = 0
        else:
            self._overtaken += started.get(self.merged, 0)

    def _switching_seconds(self, *choices: Adapter) -> float:
        """The time to merge and unmerge these adapters."""
        return sum(self.costs_of(choice).round_trip for choice in choices if choice is not None)

    def _switch(self, choice: Adapter) -> None:
        if self.switches:
            seconds = self._switching_seconds(self._previous, self.merged)
            if self._benefit < seconds:
                self.patience *= PATIENCE_FACTOR
            elif self._benefit > PATIENCE_FACTOR * self.patience * seconds:
                self.patience = max(1, self.patience // PATIENCE_FACTOR)
        self._previous, self.merged = self.merged, choice
        self.switches += 1
        self._regrets.clear()
        self._benefit, self._overtaken = 0.0, 0
