"""Types of the records in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NotRequired, TypeAlias, TypedDict

AdapterMetrics: TypeAlias = Mapping[str, float | None]
"""Metric -> value; None where it is not finite."""


class SavedMetrics(TypedDict):
    """Size and SHA-256 of metrics.jsonl."""

    metrics_size: int
    metrics_sha256: str


class StoppedAdapter(TypedDict):
    """The step after which the guard stopped training an adapter, and the reason."""

    step: int
    why: str


class RetiredAdapter(TypedDict):
    """The last step of an adapter that left the run before its end, and the reason."""

    step: int
    why: Literal["patience", "halving"]


class StepRecord(TypedDict):
    """The steps since the last record."""

    kind: Literal["step"]
    step: int
    seconds: float
    """Of training, evaluations excluded."""
    tokens: int
    tokens_per_second: float
    time_shares: dict[str, float]
    task_tokens: dict[str, int]
    """Task -> tokens drawn since the start of the run."""
    gradient_bytes_sent: int
    adapters: Mapping[str, AdapterMetrics]
    """Adapter name -> loss, lr, gradient_norm, tokens, skipped_steps and rollbacks; balance_loss or
    gate_loss, the mean of its steps, of an adapter whose routers or gates have one."""
    quarantined: NotRequired[Mapping[str, StoppedAdapter]]


class EvaluationRecord(TypedDict):
    """An evaluation during training."""

    kind: Literal["evaluation"]
    step: int
    max_examples: int | None
    adapters: Mapping[str, AdapterMetrics]
    """Adapter name -> held-out loss and bits_per_byte."""
    left: NotRequired[Mapping[str, RetiredAdapter]]
    """Adapters that have retired."""


Record: TypeAlias = StepRecord | EvaluationRecord
RecordKind: TypeAlias = Literal["step", "evaluation"]
