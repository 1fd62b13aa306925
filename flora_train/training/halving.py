"""Which settings of a sweep go on? At each rung, of the adapters of one task, those with the lower held-out losses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.sweep import SweepConfig

FACTOR = 2


class Halving:
    """Successive halving (Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS
    2016) of every sweep on every task. rungs: the run's steps at which is compared; none where nothing is halved.
    """

    def __init__(self, specs: Sequence[AdapterSpec], config: SweepConfig, steps: int) -> None:
        self.factor = config.factor or FACTOR
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        if config.strategy == "halving":
            for adapter, spec in enumerate(specs):
                if spec.sweep is not None:
                    groups[spec.task, spec.sweep].append(adapter)
        self.groups = list(groups.values())
        self.rungs = list(config.rungs or ()) if self.groups else []
        if self.groups and config.rungs is None:
            needed = max(map(self._needed, map(len, self.groups)))
            self.rungs = sorted({max(1, steps // self.factor**i) for i in range(1, needed + 1)})

    def losers(self, losses: Mapping[int, float], step: int, gone: Collection[int]) -> list[int]:
        """Who leaves after `step` steps. losses: held-out, by adapter id, of those that are still there; one that is no number is the
        highest. gone: who left before, for whatever reason."""
        if step not in self.rungs:
            return []
        to_come = len(self.rungs) - self.rungs.index(step)
        leaving: list[int] = []
        for members in self.groups:
            needed = min(self._needed(len(members)), len(self.rungs))
            if to_come > needed:
                continue  # a smaller sweep than others is halved at the last rungs
            part = self.factor ** (needed - to_come + 1)
            there = sorted((a for a in members if a not in gone), key=lambda a: (_comparable(losses[a]), a))
            leaving += there[math.ceil(len(members) / part) :]
        return sorted(leaving)

    def _needed(self, members: int) -> int:
        """Rungs until one is left."""
        return math.ceil(round(math.log(members, self.factor), 9))


def _comparable(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
