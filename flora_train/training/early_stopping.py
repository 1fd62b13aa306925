"""Who has left the run before its end, when, and why? Adapters that learnt what they will, or lost their sweep."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.schema import RunConfig
from flora_train.config.sweep import SweepConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retirement:
    """step: of the run, after which the adapter was in no step."""

    step: int
    why: Literal["patience", "halving", "finished"]
    """finished: the run had ended before other tasks joined it."""


class EarlyStopping:
    """gone: adapter id -> its retirement. A function of what was observed, in its order: processes that observe the same agree, and
    so does a resumed run."""

    def __init__(self, specs: Sequence[AdapterSpec], config: RunConfig) -> None:
        self.specs = specs
        self.patience = Patience(specs)
        self.halving = SuccessiveHalving(specs, config.sweep, config.training.steps)
        self.retired: dict[int, Retirement] = {}

    @property
    def left(self) -> dict[str, int]:
        """Adapter name -> the first step without it, counted from 0."""
        return {self.specs[adapter].name: retirement.step for adapter, retirement in self.retired.items()}

    def after_evaluation(self, losses: Mapping[int, float], step: int) -> bool:
        """Held-out losses after `step` steps, of those that are still there; returns whether some leave."""
        patient = self.patience.observe(losses)
        self._leave(patient, Retirement(step, "patience"), "had no better held-out loss for as long as its patience")
        eliminated = self.halving.eliminated(losses, step, self.retired)
        self._leave(eliminated, Retirement(step, "halving"), "has one of the higher held-out losses of its sweep")
        return bool(patient or eliminated)

    def record(self) -> dict[str, dict[str, Any]]:
        """Adapter name -> step and reason, as the log has them."""
        return {
            self.specs[adapter].name: {"step": d.step, "why": d.why} for adapter, d in self.retired.items() if d.why != "finished"
        }

    def to_json(self) -> dict[str, Any]:
        """Lists, because JSON's keys are text."""
        gone = [(adapter, *astuple(retirement)) for adapter, retirement in self.retired.items()]
        return {"gone": gone, **self.patience.to_json()}

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self.retired = {adapter: Retirement(step, why) for adapter, step, why in state["gone"]}
        self.patience.take(state)

    def _leave(self, adapters: Iterable[int], retirement: Retirement, words: str) -> None:
        for adapter in adapters:
            self.retired[adapter] = retirement
            logger.info(f"{self.specs[adapter].name} leaves after step {retirement.step}: it {words}")


class Patience:
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


FACTOR = 2


class SuccessiveHalving:
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

    def eliminated(self, losses: Mapping[int, float], step: int, gone: Collection[int]) -> list[int]:
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
