"""How a run trains: mixture, optimizer steps, guard, paging, kernels and trackers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from flora_train.config.base import MOST_STEPS, MOST_TOKENS, ConfigModel, PathText, Text
from flora_train.config.errors import user_error
from flora_train.config.paths import RawConfig


class MixtureConfig(ConfigModel):
    strategy: Literal["uniform", "proportional", "temperature", "fair"] = "fair"
    """Which task the next example comes from. uniform: by weight. proportional: by weight x examples.
    temperature: proportional ** (1 / temperature). fair: the task with the fewest tokens served so far,
    per weight (virtual token counter)."""
    temperature: float | None = Field(None, ge=0.01, le=1_000_000, validate_default=True)
    """temperature strategy only (1 is proportional, large is uniform)."""
    examples_per_draw: int = Field(1, ge=1, le=1_000_000)
    """Consecutive examples of a task that enter a step together: the least batch of an adapter's step."""

    active_tasks: int | None = Field(None, ge=1, le=1_000_000)
    """fair only: so many tasks take part at a time, those with the fewest tokens so far; the others wait for their turn. With many more
    adapters than the device has room for (adapters.device_slots) their numbers then move once a turn, not every step. Default: all."""
    turn_steps: int | None = Field(None, ge=1, le=MOST_STEPS, validate_default=True)
    """active_tasks: steps of a turn. Default: 20."""

    @field_validator("active_tasks", "turn_steps")
    @classmethod
    def _turns_belong_to_fair(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("strategy", "fair") != "fair":
            raise ValueError("is for strategy=fair, which knows whose turn it is: remove it")
        if value is not None and info.field_name == "turn_steps" and info.data.get("active_tasks") is None:
            raise ValueError("is how long active_tasks take part, and all do: give both, or remove it")
        return value

    @field_validator("temperature")
    @classmethod
    def _belongs_to_its_strategy(cls, temperature: float | None, info: ValidationInfo) -> float | None:
        if "strategy" in info.data and (temperature is not None) != (info.data["strategy"] == "temperature"):
            raise ValueError("temperature and strategy=temperature go together: give both or neither")
        return temperature


class GuardConfig(ConfigModel):
    policy: Literal["skip", "rollback", "quarantine"] = "skip"
    """What follows a bad step: a loss or gradient that is not finite, or a spike. skip: the adapter is left as it was. rollback: it
    goes back to where it was at the last checkpoint step, moments included, and trains on. quarantine: it goes back and learns no
    more; its rows stay in the batch, so that other adapters are the same to the last bit whatever happens to it."""
    spike_factor: float | None = Field(None, gt=1, le=1e9)
    """A step's loss more than so many times the median of the adapter's last good ones is a spike. Default: none is."""
    window: int | None = Field(None, ge=4, le=10_000, validate_default=True)
    """spike_factor: how many losses the median is of; nothing is a spike until there are so many. Default: 16."""
    rollbacks: int | None = Field(None, ge=1, le=1_000_000, validate_default=True)
    """rollback: after so many the next bad step is quarantine. Default: 3."""

    @field_validator("window", "rollbacks")
    @classmethod
    def _belongs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.field_name == "window" and info.data.get("spike_factor") is None:
            raise ValueError(
                "says what a spike is measured by, and no spike is looked for: give guard.spike_factor, too, or remove it"
            )
        if value is not None and info.field_name == "rollbacks" and info.data.get("policy") not in ("rollback", None):
            raise ValueError("has no meaning but for policy=rollback: remove it")
        return value


class PagingConfig(ConfigModel):
    device_slots: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = "auto"
    """The device has room for so many adapters of the largest kind (weights, gradient, moments), however many there are; those of a
    step must fit. Also written adapters.device_slots. auto: all, on a GPU as many as fit into half of its free memory."""
    host: Literal["memory", "disk"] = "memory"
    """Where the others are: in memory, pinned for a GPU, or in files without a name, which nobody else can write to. In
    files is then, too, the copy of all that a checkpoint takes while it is written, and what the guard goes back to."""
    folder: PathText | None = Field(None, validate_default=True)
    """host=disk: where the files are, best on a disk of this machine. Default: beside the run folder."""

    @field_validator("folder")
    @classmethod
    def _belongs_to_disk(cls, folder: str | None, info: ValidationInfo) -> str | None:
        if folder is not None and info.data.get("host") == "memory":
            raise ValueError("is where host=disk has its files: give both, or remove it")
        return folder


ALIAS = "adapters.device_slots"


def place_device_slots(raw: RawConfig) -> RawConfig:
    """A raw configuration with `adapters.device_slots`, which is no adapter, moved to where it belongs.

    Raises UserError if paging.device_slots says something else.
    """
    adapters: Any = raw.get("adapters")
    if not isinstance(adapters, dict) or "device_slots" not in adapters:
        return raw
    slots, paging = adapters["device_slots"], raw.get("paging") or {}
    if isinstance(paging, dict) and paging.get("device_slots", slots) != slots:
        raise user_error(
            ALIAS, slots, f"is {paging['device_slots']!r} as paging.device_slots: they are one setting, give one of them"
        )
    rest = {name: adapter for name, adapter in adapters.items() if name != "device_slots"}
    return {**raw, "adapters": rest, "paging": {**paging, "device_slots": slots} if isinstance(paging, dict) else paging}


class TrainingConfig(ConfigModel):
    steps: int = Field(ge=1, le=MOST_STEPS)
    """Optimizer steps of the run."""
    tokens_per_step: int = Field(4096, ge=16, le=MOST_TOKENS)
    """Tokens of all adapters and all processes in one optimizer step. A task's example counts once per
    adapter that learns from it."""
    tokens_per_microbatch: int = Field(2048, ge=16, le=MOST_TOKENS)
    """Padded tokens in one forward pass on one device: what fits in memory. Steps accumulate micro-batches."""
    max_length: int = Field(512, ge=4, le=MOST_TOKENS, validate_default=True)
    """Longest example in tokens, prompt included."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw (Loshchilov & Hutter 2019) or plain sgd with the same decoupled decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(1e-8, ge=1e-30, le=1)
    """AdamW's denominator constant."""
    log_every: int = Field(10, ge=1, le=MOST_STEPS)
    """Steps between two progress lines and rows of metrics.jsonl."""
    save_every: int = Field(20, ge=1, le=MOST_STEPS)
    """Steps between two checkpoints for resume=true: adapters, optimizer and position, never the base. They are written while training
    goes on, from a copy."""
    keep_checkpoints: int = Field(2, ge=1, le=100_000)
    """So many of the last stay: one is enough, unless it is damaged. Each adapter's best state is kept apart."""
    compare_separate: bool = False
    """Measure after training what the adapters of one step cost when each is trained on its own, for the report."""
    compare_separate_seconds: float | None = Field(None, gt=0, le=1_000_000, validate_default=True)
    """compare_separate: the most seconds that the measurement may take; where they do not suffice for all adapters, the
    cost is estimated from those that were measured. Default: 60."""

    @field_validator("compare_separate_seconds")
    @classmethod
    def _limit_belongs_to_the_comparison(cls, seconds: float | None, info: ValidationInfo) -> float | None:
        if seconds is not None and info.data.get("compare_separate") is False:
            raise ValueError("requires training.compare_separate=true: set it, or remove this key")
        return seconds

    @field_validator("max_length")
    @classmethod
    def _an_example_must_fit(cls, max_length: int, info: ValidationInfo) -> int:
        for key in ("tokens_per_microbatch", "tokens_per_step"):
            if max_length > info.data.get(key, max_length):
                raise ValueError(f"does not fit into {key} = {info.data[key]}: raise the latter or shorten it")
        return max_length


class KernelsConfig(ConfigModel):
    backend: Literal["auto", "torch", "triton"] = "auto"
    """What computes the adapters. torch: batched matmuls. triton: our kernels, on a GPU. auto: triton on Hopper GPUs, where it
    was timed, and torch elsewhere."""
    precision: Literal["auto", "split", "fused"] = "auto"
    """fLoRA on a base in half precision. split: x W0 + x (W0 * (M - 1)) where M is near 1, which keeps modulations that half precision
    cannot hold beside 1. fused: x (W0 * M), one matmul less. auto: split."""


class TrackingConfig(ConfigModel):
    trackers: list[Literal["wandb", "tensorboard"]] = []
    """Where metrics go besides metrics.jsonl."""
    project: Text = "flora_train"
    """Project name at the tracker."""
    group: Text | None = None
    """wandb's name for runs that belong together."""
    artifacts: bool = False
    """Give wandb the report and all adapters, too."""
    online: bool = False
    """Let wandb talk to its server. Off: it writes to the run folder, and `wandb sync` sends it later."""
