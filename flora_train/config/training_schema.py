"""How a run trains: mixture, optimizer steps, guard, paging, kernels and trackers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from flora_train.config.base import MOST_STEPS, MOST_TOKENS, ConfigModel, PathText, Text
from flora_train.config.errors import user_error
from flora_train.config.paths import RawConfig


class MixtureConfig(ConfigModel):
    strategy: Literal["uniform", "proportional", "temperature", "fair"] = "fair"
    """How the task of the next examples is chosen. uniform: at random, by weight. proportional: at random, by
    weight x number of examples. temperature: as proportional, with the shares raised to 1 / temperature.
    fair: the task with the fewest tokens so far, per weight (virtual token counter)."""
    temperature: float | None = Field(None, ge=0.01, le=1_000_000, validate_default=True)
    """Required by strategy=temperature, and only used there: 1 is proportional, large values are uniform."""
    examples_per_draw: int = Field(1, ge=1, le=1_000_000)
    """Number of consecutive examples of a task that enter a step together, which is the smallest batch of an
    adapter's step."""
    active_tasks: int | None = Field(None, ge=1, le=1_000_000)
    """With strategy=fair: number of tasks that are trained at a time, those with the fewest tokens so far,
    while the others wait for their turn. With many more adapters than fit on the device
    (adapters.device_slots), adapters are then moved once per turn, not in every step. Default: all tasks."""
    turn_steps: int | None = Field(None, ge=1, le=MOST_STEPS, validate_default=True)
    """With active_tasks: number of steps of a turn. Default: 20."""

    @field_validator("active_tasks", "turn_steps")
    @classmethod
    def _turns_require_fair(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None:
            return value
        if info.data.get("strategy", "fair") != "fair":
            raise ValueError("requires strategy=fair: set it, or remove this key")
        if info.field_name == "turn_steps" and info.data.get("active_tasks") is None:
            raise ValueError("requires active_tasks: set it, or remove this key")
        return value

    @field_validator("temperature")
    @classmethod
    def _belongs_to_its_strategy(cls, temperature: float | None, info: ValidationInfo) -> float | None:
        strategy = info.data.get("strategy")
        if strategy is None or (temperature is not None) == (strategy == "temperature"):
            return temperature
        if temperature is None:
            raise ValueError("is required by strategy=temperature: give both or neither")
        raise ValueError("requires strategy=temperature: give both or neither")


class GuardConfig(ConfigModel):
    policy: Literal["skip", "rollback", "quarantine"] = "skip"
    """What happens to an adapter after a bad step: a loss or gradient that is not finite, or a spike of the
    loss. skip: the step does not change it. rollback: it returns to its state at the last checkpoint step,
    optimizer moments included, and trains on. quarantine: it returns to that state and is no longer trained;
    its rows stay in the batch, so that the other adapters are bitwise the same."""
    spike_factor: float | None = Field(None, gt=1, le=1e9)
    """A loss of more than this multiple of the median of the adapter's last good losses is a spike. Default:
    no loss is a spike."""
    window: int | None = Field(None, ge=4, le=10_000, validate_default=True)
    """With spike_factor: number of losses of the median. Before there are as many, nothing is a spike.
    Default: 16."""
    rollbacks: int | None = Field(None, ge=1, le=1_000_000, validate_default=True)
    """With policy=rollback: number of rollbacks of an adapter, after which a bad step leads to quarantine.
    Default: 3."""

    @field_validator("window")
    @classmethod
    def _requires_spike_factor(cls, window: int | None, info: ValidationInfo) -> int | None:
        if window is not None and info.data.get("spike_factor") is None:
            raise ValueError("requires guard.spike_factor: set it, or remove this key")
        return window

    @field_validator("rollbacks")
    @classmethod
    def _requires_rollback(cls, rollbacks: int | None, info: ValidationInfo) -> int | None:
        if rollbacks is not None and info.data.get("policy") not in ("rollback", None):
            raise ValueError("requires policy=rollback: set it, or remove this key")
        return rollbacks


class PagingConfig(ConfigModel):
    device_slots: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = "auto"
    """Number of adapters of the largest size for which the device has room (weights, gradient and optimizer
    moments); all adapters of a step must fit. Can also be written adapters.device_slots. auto: all adapters,
    on a GPU as many as fit into half of its free memory."""
    host: Literal["memory", "disk"] = "memory"
    """Where the other adapters are kept. memory: in host memory, pinned for a GPU. disk: in files without a
    name, which no other process can change; checkpoint staging copies and guard snapshots are then kept on
    disk as well."""
    folder: PathText | None = Field(None, validate_default=True)
    """With host=disk: folder of these files, best on a local disk. Default: the folder of the run folder."""

    @field_validator("folder")
    @classmethod
    def _requires_disk(cls, folder: str | None, info: ValidationInfo) -> str | None:
        if folder is not None and info.data.get("host") == "memory":
            raise ValueError("requires paging.host=disk: set it, or remove this key")
        return folder


ALIAS = "adapters.device_slots"


def place_device_slots(raw: RawConfig) -> RawConfig:
    """A raw configuration with `adapters.device_slots`, which is not an adapter, moved to `paging`.

    Raises UserError if paging.device_slots has another value.
    """
    adapters: Any = raw.get("adapters")
    if not isinstance(adapters, dict) or "device_slots" not in adapters:
        return raw
    slots, paging = adapters["device_slots"], raw.get("paging") or {}
    rest = {name: adapter for name, adapter in adapters.items() if name != "device_slots"}
    if not isinstance(paging, dict):
        return {**raw, "adapters": rest}
    if paging.get("device_slots", slots) != slots:
        other = paging["device_slots"]
        hint = f"is {other!r} as paging.device_slots, which is the same setting: give one of them"
        raise user_error(ALIAS, slots, hint)
    return {**raw, "adapters": rest, "paging": {**paging, "device_slots": slots}}


class TrainingConfig(ConfigModel):
    steps: int = Field(ge=1, le=MOST_STEPS)
    """Number of optimizer steps of the run."""
    tokens_per_step: int = Field(4096, ge=16, le=MOST_TOKENS)
    """Number of tokens of all adapters and processes in one optimizer step. An example of a task counts once
    for every adapter that learns from it."""
    tokens_per_microbatch: int = Field(2048, ge=16, le=MOST_TOKENS)
    """Number of padded tokens in one forward pass on one device, limited by its memory. The gradients of the
    micro-batches of a step are accumulated."""
    max_length: int = Field(512, ge=4, le=MOST_TOKENS, validate_default=True)
    """Length of the longest example in tokens, prompt included. tasks.*.truncation decides what happens to
    longer ones."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw (Loshchilov & Hutter 2019), or plain sgd with the same decoupled weight decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW: decay rates of the first and the second moment."""
    eps: float = Field(1e-8, ge=1e-30, le=1)
    """AdamW: constant in the denominator."""
    log_every: int = Field(10, ge=1, le=MOST_STEPS)
    """Number of steps between two progress lines, and between two rows of metrics.jsonl."""
    save_every: int = Field(20, ge=1, le=MOST_STEPS)
    """Number of steps between two checkpoints for resume=true. A checkpoint holds adapters, optimizer and
    training state, never the base model. It is written from a copy while training continues."""
    keep_checkpoints: int = Field(2, ge=1, le=100_000)
    """Number of checkpoints to retain. With 2, the run can be resumed if the last one is damaged. The best
    state of every adapter is saved separately."""
    compare_separate: bool = False
    """Measure after training the cost of the adapters of a step when each is trained on its own, for the
    report."""
    compare_separate_seconds: float | None = Field(None, gt=0, le=1_000_000, validate_default=True)
    """With compare_separate: seconds that the measurement may take. If they do not suffice for all adapters,
    the cost is estimated from those that were measured. Default: 60."""

    allow_slow: bool = False
    """Train on a CPU even if it is estimated to take more than 30 days. false: the run is refused before
    anything is downloaded."""

    @field_validator("compare_separate_seconds")
    @classmethod
    def _requires_comparison(cls, seconds: float | None, info: ValidationInfo) -> float | None:
        if seconds is not None and info.data.get("compare_separate") is False:
            raise ValueError("requires training.compare_separate=true: set it, or remove this key")
        return seconds

    @field_validator("max_length")
    @classmethod
    def _an_example_must_fit(cls, max_length: int, info: ValidationInfo) -> int:
        for key in ("tokens_per_microbatch", "tokens_per_step"):
            limit = info.data.get(key, max_length)
            if max_length > limit:
                raise ValueError(f"is more than {key} = {limit}: raise {key}, or lower max_length")
        return max_length


class KernelsConfig(ConfigModel):
    backend: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of the adapters. torch: batched matmuls. triton: Triton kernels, on a GPU. auto: triton
    on Hopper GPUs, where it was measured to be faster, else torch."""
    precision: Literal["auto", "split", "fused"] = "auto"
    """fLoRA on a base model in half precision. split: x W0 + x (W0 * (M - 1)) where M is near 1, which
    preserves modulations that half precision cannot represent beside 1. fused: x (W0 * M), one matmul less.
    auto: split."""


class TrackingConfig(ConfigModel):
    trackers: list[Literal["wandb", "tensorboard"]] = []
    """Experiment trackers that receive the metrics, beside metrics.jsonl."""
    project: Text = "flora_train"
    """Name of the project at the tracker."""
    group: Text | None = None
    """wandb: name of a group of runs. Default: no group."""
    artifacts: bool = False
    """wandb: upload the report and all adapters as artifacts."""
    online: bool = False
    """wandb: connect to its server. false: it writes into the run folder, and `wandb sync` uploads it
    later."""
