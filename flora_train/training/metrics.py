"""What has happened to each adapter and task so far? Counts for the log, kept across interruptions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import Any

from flora_train.adapters.spec import AdapterSpec
from flora_train.training.optimizer import AdapterStep
from flora_train.training.step_plan import StepPlan


@dataclass
class TrainingMetrics:
    """By adapter id or task name; `recent`: since the last line of the log."""

    tokens: Counter[int] = field(default_factory=Counter)
    skipped: Counter[int] = field(default_factory=Counter)
    task_tokens: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of gradients that this process has put into exchanges."""
    recent_nats: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    recent_label_tokens: Counter[int] = field(default_factory=Counter)
    last: dict[int, AdapterStep] = field(default_factory=dict)
    last_losses: dict[str, str] = field(default_factory=dict)
    """Family -> what the progress line said last."""

    def count(self, plan: StepPlan, nats: Sequence[float], steps: Mapping[int, AdapterStep], sent: int) -> None:
        """Add a step. nats: summed loss by adapter id; sent: bytes of gradients that went into exchanges."""
        self.sent["gradients"] += sent
        for rows in plan.microbatches:
            for row in rows:
                self.tokens[row.adapter] += row.length
        self.task_tokens.update(plan.task_tokens)
        for adapter, tokens in plan.label_tokens.items():
            self.recent_nats[adapter] += nats[adapter]
            self.recent_label_tokens[adapter] += tokens
            self.skipped[adapter] += steps[adapter].skipped
        self.last.update(steps)

    def recent_losses(self) -> dict[int, float]:
        """Nats per learnt token since the last line, of the adapters that learnt."""
        return {adapter: self.recent_nats[adapter] / tokens for adapter, tokens in self.recent_label_tokens.items()}

    def flush(self, specs: Sequence[AdapterSpec]) -> dict[str, dict[str, Any]]:
        """Adapter name -> what the log says of it; begins a new line."""
        record = {
            specs[adapter].name: {
                "loss": loss,
                "lr": self.last[adapter].lr,
                "gradient_norm": self.last[adapter].gradient_norm,
                "tokens": self.tokens[adapter],
                "skipped_steps": self.skipped[adapter],
            }
            for adapter, loss in self.recent_losses().items()
        }
        self.recent_nats.clear()
        self.recent_label_tokens.clear()
        return record

    def facts(self, specs: Sequence[AdapterSpec], seconds: float) -> dict[str, str]:
        """Tokens per second and the mean recent loss of every method, for the progress line."""
        per_family: dict[str, list[float]] = defaultdict(list)
        for adapter, loss in self.recent_losses().items():
            per_family[specs[adapter].family].append(loss)
        for family, losses in per_family.items():
            self.last_losses[family] = f"{sum(losses) / len(losses):.3f}"
        return {"tok/s": f"{self.tokens.total() / seconds:.0f}", **self.last_losses}

    def to_json(self) -> dict[str, Any]:
        """Lists of pairs, because JSON's keys are text."""
        pairs = {f.name: list(getattr(self, f.name).items()) for f in fields(self) if f.name not in ("last", "last_losses")}
        return pairs | {"last": [(adapter, astuple(step)) for adapter, step in self.last.items()]}

    @classmethod
    def from_json(cls, pairs: Mapping[str, Any]) -> TrainingMetrics:
        tally = cls(last={adapter: AdapterStep(*step) for adapter, step in pairs["last"]})
        for name in pairs.keys() - {"last"}:
            getattr(tally, name).update(dict(pairs[name]))
        return tally


def tracker_keys(stage: str, specs: Sequence[AdapterSpec], adapters: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """As trackers group them: `<stage>/<task>/<method>/<figure>`. adapters: name -> figures."""
    of = {spec.name: f"{stage}/{spec.task}/{spec.family}" for spec in specs}
    return {f"{of[name]}/{key}": value for name, facts in adapters.items() for key, value in facts.items()}
