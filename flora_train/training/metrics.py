"""Metrics of every adapter and task for the log, kept across interruptions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from flora_train.adapters.spec import AdapterSpec
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
        self.recent_nats: Counter[int] = Counter()
        self.recent_label_tokens: Counter[int] = Counter()
        self.last_steps: dict[int, AdapterStep] = {}
        """Adapter id -> its last update."""
        self._shown_losses: dict[str, str] = {}
        """Family -> its mean loss on the last progress line."""

    def count(
        self, plan: StepPlan, nats: Sequence[float], steps: Mapping[int, AdapterStep], bytes_sent: int
    ) -> None:
        """Add a step. nats: summed loss by adapter id; bytes_sent: of gradients, by this process."""
        self.gradient_bytes_sent += bytes_sent
        for rows in plan.microbatches:
            for row in rows:
                self.tokens[row.adapter] += row.length
        self.task_tokens.update(plan.task_tokens)
        for adapter, tokens in plan.label_tokens.items():
            self.recent_nats[adapter] += nats[adapter]  # type: ignore[assignment]
            self.recent_label_tokens[adapter] += tokens
            self.skipped[adapter] += steps[adapter].skipped
        self.last_steps.update(steps)

    def recent_losses(self) -> dict[int, float]:
        """Nats per label token since the last log record, of the adapters that were trained."""
        return {
            adapter: self.recent_nats[adapter] / tokens
            for adapter, tokens in self.recent_label_tokens.items()
        }

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
        self.recent_nats.clear()
        self.recent_label_tokens.clear()
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
        return {
            "tokens": by_name(self.tokens, self.specs),
            "skipped": by_name(self.skipped, self.specs),
            "task_tokens": dict(self.task_tokens),
            "gradient_bytes_sent": self.gradient_bytes_sent,
            "recent_nats": by_name(self.recent_nats, self.specs),
            "recent_label_tokens": by_name(self.recent_label_tokens, self.specs),
            "last_steps": by_name(steps, self.specs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tokens = Counter(by_id(state["tokens"], self.specs))
        self.skipped = Counter(by_id(state["skipped"], self.specs))
        self.task_tokens = Counter(state["task_tokens"])
        self.gradient_bytes_sent = state["gradient_bytes_sent"]
        self.recent_nats = Counter(by_id(state["recent_nats"], self.specs))
        self.recent_label_tokens = Counter(by_id(state["recent_label_tokens"], self.specs))
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
