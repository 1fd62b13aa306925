"""Early stopping: adapters that retire before the run ends, by patience or by successive halving of their
sweep.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.schema import RunConfig
from flora_train.config.sweep import SweepConfig
from flora_train.runtime.metric_records import RetiredAdapter
from flora_train.training.train_state import by_id, by_name

logger = logging.getLogger(__name__)

DEFAULT_FACTOR = 2
"""Default of sweep.factor."""


@dataclass(frozen=True)
class Retirement:
    """When and why an adapter left the run."""

    step: int
    """The last step of the run before the adapter left."""
    why: Literal["patience", "halving", "finished"]
    """finished: the run had ended before other tasks were added to it."""


class EarlyStopping:
    """Retires adapters after evaluations.

    Its decisions depend on the observed losses alone: processes that observe the same losses agree, and so
    does a resumed run.
    """

    def __init__(self, specs: Sequence[AdapterSpec], config: RunConfig) -> None:
        self.specs = specs
        self.figures = {name: task.select_by for name, task in config.tasks.items()}
        """Task -> what its adapters are compared by; None: the held-out loss."""
        self.patience = Patience(specs)
        self.halving = SuccessiveHalving(specs, config.sweep, config.training.steps)
        self.retired: dict[int, Retirement] = {}
        """Adapter id -> its retirement."""

    @property
    def may_retire(self) -> bool:
        """Whether adapters can retire before their max_steps."""
        return bool(self.halving.groups) or any(spec.patience is not None for spec in self.specs)

    @property
    def first_absent_steps(self) -> dict[str, int]:
        """Adapter name -> the first step without it, counted from 0."""
        return {self.specs[adapter].name: retirement.step for adapter, retirement in self.retired.items()}

    def after_evaluation(self, losses: Mapping[int, float], step: int) -> bool:
        """Held-out losses of the active adapters after `step` steps, or the scores of `Selection`; returns
        whether adapters retire."""
        impatient = self.patience.observe(losses)
        self._retire(impatient, Retirement(step, "patience"), "has not improved within its patience")
        eliminated = self.halving.eliminated(losses, step, self.retired)
        self._retire(eliminated, Retirement(step, "halving"), "is among the worst of its sweep")
        return bool(impatient or eliminated)

    def record(self) -> dict[str, RetiredAdapter]:
        """Adapter name -> step and reason, for the log."""
        stopped: dict[int, RetiredAdapter] = {}
        for adapter, entry in self.retired.items():
            if entry.why != "finished":
                stopped[adapter] = {"step": entry.step, "why": entry.why}
        return by_name(stopped, self.specs)

    def state_dict(self) -> dict[str, Any]:
        retired = {adapter: asdict(entry) for adapter, entry in self.retired.items()}
        return {"retired": by_name(retired, self.specs), "patience": self.patience.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        retired = by_id(state["retired"], self.specs)
        self.retired = {adapter: Retirement(**entry) for adapter, entry in retired.items()}
        self.patience.load_state_dict(state["patience"])

    def _retire(self, adapters: Iterable[int], retirement: Retirement, reason: str) -> None:
        for adapter in adapters:
            self.retired[adapter] = retirement
            spec = self.specs[adapter]
            compared = self.figures.get(spec.task) or "held-out loss"
            step = retirement.step
            logger.info(f"{spec.name} stops training after step {step}: its {compared} {reason}")


class Patience:
    """The best loss of every adapter that has a patience, and the evaluations since then."""

    def __init__(self, specs: Sequence[AdapterSpec]) -> None:
        self.specs = specs
        self._best: dict[int, float] = {}
        self._waited: Counter[int] = Counter()

    def observe(self, losses: Mapping[int, float]) -> list[int]:
        """Held-out losses by adapter id (nats per token); returns the adapters whose patience has run out.
        NaN is never an improvement.
        """
        exhausted = []
        for adapter, loss in losses.items():
            patience, best = self.specs[adapter].patience, self._best.get(adapter, math.inf)
            if patience is None:
                continue
            if loss < best - self.specs[adapter].min_delta:
                self._best[adapter], self._waited[adapter] = loss, 0
                continue
            self._waited[adapter] += 1
            if self._waited[adapter] >= patience:
                exhausted.append(adapter)
        return exhausted

    def state_dict(self) -> dict[str, Any]:
        return {"best": by_name(self._best, self.specs), "waited": by_name(self._waited, self.specs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best = by_id(state["best"], self.specs)
        self._waited = Counter(by_id(state["waited"], self.specs))


class SuccessiveHalving:
    """Successive halving of every sweep on every task.

    Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS
    2016.
    """

    def __init__(self, specs: Sequence[AdapterSpec], config: SweepConfig, steps: int) -> None:
        self.factor = config.factor or DEFAULT_FACTOR
        self.groups = _sweeps(specs) if config.strategy == "halving" else []
        self.rungs: list[int] = []
        """Steps of the run after which adapters are compared."""
        if self.groups and config.rungs is not None:
            self.rungs = list(config.rungs)
        elif self.groups:
            needed = max(self._rungs_needed(len(members)) for members in self.groups)
            self.rungs = sorted({max(1, steps // self.factor**i) for i in range(1, needed + 1)})

    def eliminated(self, losses: Mapping[int, float], step: int, retired: Collection[int]) -> list[int]:
        """Adapters eliminated after `step` steps. The seeds of a setting stay or leave together, by their
        mean loss.

        losses: held-out, by adapter id, of the active adapters; NaN counts as the highest. retired: adapters
        that were retired before, for any reason.
        """
        if step not in self.rungs:
            return []
        remaining = len(self.rungs) - self.rungs.index(step)
        leaving: list[int] = []
        for members in self.groups:
            needed = min(self._rungs_needed(len(members)), len(self.rungs))
            if remaining > needed:
                continue  # a smaller sweep than others is halved at the last rungs
            survivors = math.ceil(len(members) / self.factor ** (needed - remaining + 1))
            active = [[seed for seed in seeds if seed not in retired] for seeds in members]
            ranked = sorted((_mean_loss(losses, seeds), seeds) for seeds in active if seeds)
            for _, seeds in ranked[survivors:]:
                leaving += seeds
        return sorted(leaving)

    def _rungs_needed(self, members: int) -> int:
        """Rungs until one of `members` settings is left."""
        return math.ceil(round(math.log(members, self.factor), 9))


def _sweeps(specs: Sequence[AdapterSpec]) -> list[list[list[int]]]:
    """The settings of every sweep on every task; each is one adapter, or its adapters of several seeds."""
    groups: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for adapter, spec in enumerate(specs):
        if spec.sweep is not None:
            groups[spec.task, spec.sweep][spec.seeds_of or spec.family].append(adapter)
    return [list(settings.values()) for settings in groups.values()]


def _mean_loss(losses: Mapping[int, float], adapters: Sequence[int]) -> float:
    return sum(_nan_last(losses[adapter]) for adapter in adapters) / len(adapters)


def _nan_last(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
