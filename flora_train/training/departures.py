"""Who has left the run before its end, when, and why? Adapters that learnt what they will, or lost their sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.schema import RunConfig
from flora_train.training.distributed import say
from flora_train.training.halving import Halving
from flora_train.training.stopping import EarlyStopping


@dataclass(frozen=True)
class Departure:
    """step: of the run, after which the adapter was in no step."""

    step: int
    why: Literal["patience", "halving", "finished"]
    """finished: the run had ended before other tasks joined it."""


class Departures:
    """gone: adapter id -> its departure. A function of what was observed, in its order: processes that observe the same agree, and
    so does a resumed run."""

    def __init__(self, specs: Sequence[AdapterSpec], config: RunConfig) -> None:
        self.specs = specs
        self.stopping = EarlyStopping(specs)
        self.halving = Halving(specs, config.sweep, config.training.steps)
        self.gone: dict[int, Departure] = {}

    @property
    def left(self) -> dict[str, int]:
        """Adapter name -> the first step without it, counted from 0."""
        return {self.specs[adapter].name: departure.step for adapter, departure in self.gone.items()}

    def after_evaluation(self, losses: Mapping[int, float], step: int) -> bool:
        """Held-out losses after `step` steps, of those that are still there; returns whether some leave."""
        patient = self.stopping.observe(losses)
        self._leave(patient, Departure(step, "patience"), "had no better held-out loss for as long as its patience")
        losers = self.halving.losers(losses, step, self.gone)
        self._leave(losers, Departure(step, "halving"), "has one of the higher held-out losses of its sweep")
        return bool(patient or losers)

    def record(self) -> dict[str, dict[str, Any]]:
        """Adapter name -> step and reason, as the log has them."""
        return {
            self.specs[adapter].name: {"step": d.step, "why": d.why} for adapter, d in self.gone.items() if d.why != "finished"
        }

    def to_json(self) -> dict[str, Any]:
        """Lists, because JSON's keys are text."""
        gone = [(adapter, *astuple(departure)) for adapter, departure in self.gone.items()]
        return {"gone": gone, **self.stopping.to_json()}

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self.gone = {adapter: Departure(step, why) for adapter, step, why in state["gone"]}
        self.stopping.take(state)

    def _leave(self, adapters: Iterable[int], departure: Departure, words: str) -> None:
        for adapter in adapters:
            self.gone[adapter] = departure
            say(f"{self.specs[adapter].name} leaves after step {departure.step}: it {words}")
