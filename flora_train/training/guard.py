"""The guard against anomalies of single adapters: non-finite losses and gradients, and loss spikes.

A bad step does not move the adapter. By policy the adapter also returns to its last good state, or stops
learning.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.config.training_schema import GuardConfig
from flora_train.runtime.metric_records import StoppedAdapter
from flora_train.training.optimizer import AdapterStep, BankOptimizer
from flora_train.training.train_state import by_id, by_name

logger = logging.getLogger(__name__)

DEFAULT_WINDOW, DEFAULT_ROLLBACKS = 16, 3


class Quarantine(NamedTuple):
    """An adapter that learns no more."""

    step: int
    """The step of the run after which it was quarantined."""
    why: str


class Guard:
    """Decides about each adapter from its own losses and gradients alone.

    Processes that see the same losses and gradients decide alike. A rollback copies rows of that adapter
    only.
    """

    def __init__(self, bank: AdapterBank, optimizer: BankOptimizer, config: GuardConfig) -> None:
        self.bank, self.optimizer, self.config = bank, optimizer, config
        self.rolled_back: Counter[int] = Counter()
        """Adapter id -> number of rollbacks."""
        self.quarantined: dict[int, Quarantine] = {}
        window = config.window or DEFAULT_WINDOW
        self._losses: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=window))
        self._snapshot: tuple[dict[str, Tensor], list[int]] | None = None

    def find_anomalies(self, losses: Mapping[int, float]) -> dict[int, str]:
        """Adapter id -> the reason why the adapter must not learn from this step. losses: mean nats per token
        of the step, by adapter id.
        """
        anomalies = {}
        for adapter, loss in losses.items():
            if adapter in self.quarantined:
                anomalies[adapter] = "it is quarantined"
            elif not math.isfinite(loss):
                anomalies[adapter] = "its loss is not finite"
            elif self._is_spike(adapter, loss):
                anomalies[adapter] = f"its loss spiked to {loss:.4g}"
            else:
                self._losses[adapter].append(loss)
        return anomalies

    def snapshot(self) -> None:
        """Copy the present state, to which later rollbacks return."""
        if self.config.policy == "skip":
            return
        tensors = {name: self.bank.copy_to_host(tensor) for name, tensor in self.bank.tensors().items()}
        self._snapshot = tensors, list(self.optimizer.steps)

    def apply_policy(self, anomalies: Mapping[int, str], steps: Mapping[int, AdapterStep], step: int) -> None:
        """Roll back or quarantine the adapters that were skipped in the run's step `step`. steps: the
        updates.
        """
        if self.config.policy == "skip":
            return
        for adapter, update in steps.items():
            if update.skipped and adapter not in self.quarantined:
                self._roll_back(adapter)
                self._count(adapter, anomalies.get(adapter, "its gradient is not finite"), step)

    def forget(self, adapters: Iterable[int]) -> None:
        """Begin anew with these adapters: their recent losses, rollbacks and quarantine count no more."""
        for adapter in adapters:
            self._losses.pop(adapter, None)
            self.quarantined.pop(adapter, None)
            self.rolled_back.pop(adapter, None)

    def record(self) -> dict[str, StoppedAdapter]:
        """Name of a quarantined adapter -> step and reason, for the log."""
        stopped: dict[int, StoppedAdapter] = {}
        for adapter, entry in self.quarantined.items():
            stopped[adapter] = {"step": entry.step, "why": entry.why}
        return by_name(stopped, self.bank.specs)

    def state_dict(self) -> dict[str, Any]:
        losses = {adapter: list(recent) for adapter, recent in self._losses.items()}
        return {
            "losses": by_name(losses, self.bank.specs),
            "rolled_back": by_name(self.rolled_back, self.bank.specs),
            "quarantined": self.record(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rolled_back = Counter(by_id(state["rolled_back"], self.bank.specs))
        quarantined = by_id(state["quarantined"], self.bank.specs)
        self.quarantined = {adapter: Quarantine(**entry) for adapter, entry in quarantined.items()}
        self._losses.clear()
        for adapter, losses in by_id(state["losses"], self.bank.specs).items():
            self._losses[adapter].extend(losses)

    def _is_spike(self, adapter: int, loss: float) -> bool:
        recent, factor = self._losses[adapter], self.config.spike_factor
        return factor is not None and len(recent) == recent.maxlen and loss > factor * median(recent)

    def _count(self, adapter: int, reason: str, step: int) -> None:
        name, limit = self.bank.specs[adapter].name, self.config.rollbacks or DEFAULT_ROLLBACKS
        if self.config.policy == "rollback" and self.rolled_back[adapter] < limit:
            self.rolled_back[adapter] += 1
            logger.warning(f"{name} is rolled back to its last good state at step {step}: {reason}")
        else:
            self.quarantined[adapter] = Quarantine(step, reason)
            logger.warning(f"{name} is quarantined at step {step}: {reason}")

    def _roll_back(self, adapter: int) -> None:
        if self._snapshot is None:
            return
        tensors, steps = self._snapshot
        pool, row = self.bank.location[adapter]
        prefix = f"pool{self.bank.pools.index(pool)}"
        for name, tensor in self.bank.state(adapter).items():
            tensor.copy_(tensors[f"{prefix}.{name}"][row])
        self.optimizer.steps[adapter] = steps[adapter]
