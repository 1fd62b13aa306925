"""Metrics of every adapter and task for the log, kept across interruptions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from flora_train.adapters.spec import BASE_ID, AdapterSpec
from flora_train.training.objectives import RewardSums, StepTotals
from flora_train.training.optimizer import AdapterStep
from flora_train.training.step_plan import StepPlan
from flora_train.training.train_state import by_id, by_name


class MetricLogger(Protocol):
    """Receives scalars, as accelerate's Accelerator does."""

    def log(self, values: dict[str, float], *, step: int) -> None: ...


class NullMetricLogger:
    """Discards all scalars."""

    def log(self, values: dict[str, float], *, step: int) -> None:
        return None


class TrainingMetrics:
    """Counts since the start of the run, and sums since the last log record (`recent_...`)."""

    def __init__(self, specs: Sequence[AdapterSpec]) -> None:
        self.specs = specs
        self.tokens: Counter[int] = Counter()
        """Adapter id -> tokens it was trained on."""
        self.skipped: Counter[int] = Counter()
        """Adapter id -> steps without an update."""
        self.task_tokens: Counter[str] = Counter()
        """Task -> tokens drawn from it."""
        self.gradient_bytes_sent = 0
        """Bytes of gradients that this process has put into exchanges."""
        self.recent_loss_sums: dict[int, float] = defaultdict(float)
        """Adapter id -> its losses, each times the tokens or preferences that it is a mean over."""
        self.recent_counts: dict[int, float] = defaultdict(int)
        """Adapter id -> these tokens, preferences or weights."""
        self.recent_rewards: dict[int, RewardSums] = {}
        self.recent_router_losses: dict[int, list[float]] = {}
        """Adapter id -> the sum of the losses of its routers or gates, and the number of their steps."""
        self.last_steps: dict[int, AdapterStep] = {}
        """Adapter id -> its last update."""
        self._shown_losses: dict[str, str] = {}
        """Family -> its mean loss on the last progress line."""

    def count(
        self, plan: StepPlan, totals: StepTotals, steps: Mapping[int, AdapterStep], bytes_sent: int
    ) -> None:
        """Add a step. bytes_sent: of gradients, by this process."""
        self.gradient_bytes_sent += bytes_sent
        for rows in plan.microbatches:
            for row in rows:
                if row.adapter != BASE_ID:
                    self.tokens[row.adapter] += row.length
        self.task_tokens.update(plan.task_tokens)
        for adapter, count in totals.counts.items():
            self.recent_loss_sums[adapter] += totals.loss_sums[adapter]
            self.recent_counts[adapter] += count
            self.skipped[adapter] += steps[adapter].skipped
        for adapter, rewards in totals.rewards.items():
            self.recent_rewards[adapter] = self.recent_rewards.get(adapter, RewardSums()) + rewards
        for adapter, loss in totals.router_losses.items():
            total, number = self.recent_router_losses.get(adapter, (0.0, 0.0))
            self.recent_router_losses[adapter] = [total + loss, number + 1]
        self.last_steps.update(steps)

    def recent_losses(self) -> dict[int, float]:
        """Mean losses since the last log record, of the adapters that were trained: nats per label token, or
        losses of preferences."""
        losses: dict[int, float] = {}
        for adapter, count in self.recent_counts.items():
            losses[adapter] = self.recent_loss_sums[adapter] / count if count else 0.0
        return losses

    def flush(self) -> dict[str, dict[str, float]]:
        """Adapter name -> its part of a log record. The recent sums are reset."""
        record = {}
        for adapter, loss in self.recent_losses().items():
            last = self.last_steps[adapter]
            record[self.specs[adapter].name] = {
                "loss": loss,
                "lr": last.lr,
                "gradient_norm": last.gradient_norm,
                "tokens": self.tokens[adapter],
                "skipped_steps": self.skipped[adapter],
            }
            rewards = self.recent_rewards.get(adapter)
            if rewards is not None:
                record[self.specs[adapter].name] |= rewards.metrics(round(self.recent_counts[adapter]))
            if adapter in self.recent_router_losses:
                total, steps = self.recent_router_losses[adapter]
                spec = self.specs[adapter]
                name = "balance_loss" if spec.gate is None else "gate_loss"
                record[spec.name][name] = total / steps
        self.recent_router_losses.clear()
        self.recent_loss_sums.clear()
        self.recent_counts.clear()
        self.recent_rewards.clear()
        return record

    def summary(self, seconds: float) -> dict[str, str]:
        """Tokens per second and the mean recent loss of every family, for the progress line."""
        losses: dict[str, list[float]] = defaultdict(list)
        for adapter, loss in self.recent_losses().items():
            losses[self.specs[adapter].family].append(loss)
        for family, values in losses.items():
            self._shown_losses[family] = f"{sum(values) / len(values):.3f}"
        return {"tok/s": f"{self.tokens.total() / seconds:.0f}", **self._shown_losses}

    def state_dict(self) -> dict[str, Any]:
        steps = {adapter: asdict(step) for adapter, step in self.last_steps.items()}
        rewards = {adapter: asdict(sums) for adapter, sums in self.recent_rewards.items()}
        return {
            "tokens": by_name(self.tokens, self.specs),
            "skipped": by_name(self.skipped, self.specs),
            "task_tokens": dict(self.task_tokens),
            "gradient_bytes_sent": self.gradient_bytes_sent,
            "recent_loss_sums": by_name(self.recent_loss_sums, self.specs),
            "recent_counts": by_name(self.recent_counts, self.specs),
            "recent_rewards": by_name(rewards, self.specs),
            "recent_router_losses": by_name(self.recent_router_losses, self.specs),
            "last_steps": by_name(steps, self.specs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tokens = Counter(by_id(state["tokens"], self.specs))
        self.skipped = Counter(by_id(state["skipped"], self.specs))
        self.task_tokens = Counter(state["task_tokens"])
        self.gradient_bytes_sent = state["gradient_bytes_sent"]
        self.recent_loss_sums = defaultdict(float, by_id(state["recent_loss_sums"], self.specs))
        self.recent_counts = defaultdict(int, by_id(state["recent_counts"], self.specs))
        rewards = by_id(state["recent_rewards"], self.specs)
        self.recent_rewards = {adapter: RewardSums(**sums) for adapter, sums in rewards.items()}
        # checkpoints of earlier versions have none
        self.recent_router_losses = by_id(state.get("recent_router_losses", {}), self.specs)
        steps = by_id(state["last_steps"], self.specs)
        self.last_steps = {adapter: AdapterStep(**step) for adapter, step in steps.items()}


def tracker_keys(
    stage: str, specs: Sequence[AdapterSpec], adapters: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Scalars as trackers group them: `<stage>/<task>/<family>/<metric>`. adapters: adapter name -> metric ->
    value.
    """
    scalars = {}
    for spec in specs:
        for metric, value in adapters.get(spec.name, {}).items():
            scalars[f"{stage}/{spec.task}/{spec.family}/{metric}"] = value
    return scalars
