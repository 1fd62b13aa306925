"""When has an adapter learnt what it will? After so many held-out evaluations in a row that were no better than its best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flora_train.adapters.spec import AdapterSpec


class EarlyStopping:
    """What is known of every adapter that has a patience. stopped: adapter id -> the run's step after which it left.

    A function of the losses that were observed, in their order: processes that observe the same agree, and so does a resumed run.
    """

    def __init__(self, specs: Sequence[AdapterSpec]) -> None:
        self.specs = specs
        self.stopped: dict[int, int] = {}
        self._best: dict[int, float] = {}
        self._waited: Counter[int] = Counter()

    def observe(self, losses: Mapping[int, float], step: int) -> list[int]:
        """Held-out losses by adapter id (nats a token) after `step` steps of the run; returns who stops now. A loss that is no
        number is no better than any."""
        leaving = []
        for adapter, loss in losses.items():
            patience, least = self.specs[adapter].patience, self._best.get(adapter, float("inf"))
            if patience is None or adapter in self.stopped:
                continue
            if loss < least - self.specs[adapter].min_delta:
                self._best[adapter], self._waited[adapter] = loss, 0
                continue
            self._waited[adapter] += 1
            if self._waited[adapter] >= patience:
                leaving.append(adapter)
        self.leave(leaving, step)
        return leaving

    def leave(self, adapters: Sequence[int], step: int) -> None:
        """They stop now, for a reason that is not theirs."""
        self.stopped.update(dict.fromkeys(adapters, step))

    def to_json(self) -> dict[str, Any]:
        """Lists of pairs, because JSON's keys are text."""
        return {
            "stopped": list(self.stopped.items()),
            "best": list(self._best.items()),
            "waited": list(self._waited.items()),
        }

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self.stopped, self._best = dict(state["stopped"]), dict(state["best"])
        self._waited = Counter(dict(state["waited"]))
