"""When has an adapter learnt what it will? After so many held-out evaluations in a row that were no better than its best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flora_train.adapters.spec import AdapterSpec


class EarlyStopping:
    """What is known of every adapter that has a patience."""

    def __init__(self, specs: Sequence[AdapterSpec]) -> None:
        self.specs = specs
        self._best: dict[int, float] = {}
        self._waited: Counter[int] = Counter()

    def observe(self, losses: Mapping[int, float]) -> list[int]:
        """Held-out losses by adapter id (nats a token); returns whose patience is over. A loss that is no number is no better than
        any."""
        leaving = []
        for adapter, loss in losses.items():
            patience, least = self.specs[adapter].patience, self._best.get(adapter, float("inf"))
            if patience is None:
                continue
            if loss < least - self.specs[adapter].min_delta:
                self._best[adapter], self._waited[adapter] = loss, 0
                continue
            self._waited[adapter] += 1
            if self._waited[adapter] >= patience:
                leaving.append(adapter)
        return leaving

    def to_json(self) -> dict[str, Any]:
        """Lists of pairs, because JSON's keys are text."""
        return {"best": list(self._best.items()), "waited": list(self._waited.items())}

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self._best, self._waited = dict(state["best"]), Counter(dict(state["waited"]))
