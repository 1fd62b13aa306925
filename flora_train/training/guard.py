"""What if one adapter goes wrong? Its bad steps are left out; by policy it goes back to its last good state, or learns no more."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.config.training_schema import GuardConfig
from flora_train.training.optimizer import AdapterStep, BankOptimizer

logger = logging.getLogger(__name__)

WINDOW, ROLLBACKS = 16, 3


class Guard:
    """Judges each adapter by its own numbers alone. rolled_back: adapter id -> how often; quarantined: -> after which step, and why.

    Processes that see the same losses and gradients decide alike. Going back copies rows of this adapter only.
    """

    def __init__(self, bank: AdapterBank, optimizer: BankOptimizer, config: GuardConfig) -> None:
        self.bank, self.optimizer, self.config = bank, optimizer, config
        self.rolled_back: Counter[int] = Counter()
        self.quarantined: dict[int, tuple[int, str]] = {}
        self._losses: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=config.window or WINDOW))
        self._good: tuple[dict[str, Tensor], list[int]] | None = None

    def find_anomalies(self, losses: Mapping[int, float]) -> dict[int, str]:
        """Who must not learn from this step, and why. losses: mean nats a token of the step, by adapter id."""
        found = {}
        for adapter, loss in losses.items():
            if adapter in self.quarantined:
                found[adapter] = "it is quarantined"
            elif not math.isfinite(loss):
                found[adapter] = "its loss is not finite"
            elif self._is_spike(adapter, loss):
                found[adapter] = f"its loss spiked to {loss:.4g}"
            else:
                self._losses[adapter].append(loss)
        return found

    def snapshot(self) -> None:
        """The state of now is what adapters go back to."""
        if self.config.policy != "skip":
            self._good = (
                {name: self.bank.copy_to_host(tensor) for name, tensor in self.bank.tensors().items()},
                list(self.optimizer.steps),
            )

    def apply_policy(self, bad: Mapping[int, str], steps: Mapping[int, AdapterStep], step: int) -> None:
        """Do what the policy says to who had a bad step, the run's `step`. bad: by `find_anomalies`; steps: what the optimizer did, or left."""
        for adapter, done in steps.items():
            if not done.skipped or adapter in self.quarantined or self.config.policy == "skip":
                continue
            self._go_back(adapter)
            name, why = self.bank.specs[adapter].name, bad.get(adapter, "its gradient is not finite")
            if self.config.policy == "rollback" and self.rolled_back[adapter] < (self.config.rollbacks or ROLLBACKS):
                self.rolled_back[adapter] += 1
                logger.warning(f"{name} goes back to its last good state at step {step}: {why}")
            else:
                self.quarantined[adapter] = step, why
                logger.warning(f"{name} is quarantined at step {step}: {why}")

    def record(self) -> dict[str, dict[str, Any]]:
        """Name of a quarantined adapter -> step and reason, as the log has them."""
        return {self.bank.specs[adapter].name: {"step": step, "why": why} for adapter, (step, why) in self.quarantined.items()}

    def to_json(self) -> dict[str, Any]:
        """Lists of pairs, because JSON's keys are text."""
        return {
            "losses": [(adapter, list(losses)) for adapter, losses in self._losses.items()],
            "rolled_back": list(self.rolled_back.items()),
            "quarantined": [(adapter, *facts) for adapter, facts in self.quarantined.items()],
        }

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self.rolled_back = Counter(dict(state["rolled_back"]))
        self.quarantined = {adapter: (step, why) for adapter, step, why in state["quarantined"]}
        for adapter, losses in state["losses"]:
            self._losses[adapter].extend(losses)

    def _is_spike(self, adapter: int, loss: float) -> bool:
        known = self._losses[adapter]
        return (
            self.config.spike_factor is not None
            and len(known) == known.maxlen
            and loss > self.config.spike_factor * median(known)
        )

    def _go_back(self, adapter: int) -> None:
        if self._good is None:
            return
        tensors, steps = self._good
        pool, member = self.bank.location[adapter]
        for name, now in self.bank.state(adapter).items():
            now.copy_(tensors[f"pool{self.bank.pools.index(pool)}.{name}"][member])
        self.optimizer.steps[adapter] = steps[adapter]
