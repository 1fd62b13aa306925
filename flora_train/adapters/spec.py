"""What is one adapter? A task, a method and its own hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass

from flora_train.config.adapter_schema import AdapterConfig, adapter_name
from flora_train.config.schema import RunConfig

BASE = "__base__"
"""The name of "no adapter": rows of this name run the frozen base model."""

BASE_ID = -1
"""Its id inside batches."""

DEFAULT_RANK = {"flora": 4, "lora": 8, "ia3": 0}


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter of a run. `family` is the key of `adapters:` in the recipe that it was expanded from."""

    name: str
    task: str
    family: str
    method: str
    rank: int
    offset: float
    """flora: 0 pure, 1 residual."""
    scaling: float
    """lora: alpha / rank, or alpha / sqrt(rank)."""
    alpha: float
    rslora: bool
    dropout: float
    lr: float
    weight_decay: float
    max_grad_norm: float | None
    lr_schedule: str
    warmup_steps: int
    max_steps: int
    target_modules: tuple[str, ...] | str
    feedforward_modules: tuple[str, ...] | None
    parent_module: str | None = None
    sweep: str | None = None
    init_from: str | None = None
    patience: int | None = None
    min_delta: float = 0.0


def make_spec(task: str, family: str, adapter: AdapterConfig, default_steps: int) -> AdapterSpec:
    """The adapter of `task` that `adapters.<family>` of a recipe describes."""
    rank = adapter.rank or DEFAULT_RANK[adapter.method]
    alpha = adapter.alpha or 2.0 * rank
    steps = adapter.max_steps or default_steps
    return AdapterSpec(
        name=adapter_name(task, family),
        task=task,
        family=family,
        method=adapter.method,
        rank=rank,
        offset=0.0 if adapter.variant == "pure" else 1.0,
        scaling=alpha / (rank**0.5 if adapter.rslora else rank) if rank else 1.0,
        alpha=alpha,
        rslora=bool(adapter.rslora),
        dropout=adapter.dropout or 0.0,
        lr=adapter.lr,
        weight_decay=adapter.weight_decay,
        max_grad_norm=adapter.max_grad_norm,
        lr_schedule=adapter.lr_schedule,
        warmup_steps=adapter.warmup_for(steps),
        max_steps=steps,
        target_modules=adapter.target_modules if isinstance(adapter.target_modules, str) else tuple(adapter.target_modules),
        feedforward_modules=None if adapter.feedforward_modules is None else tuple(adapter.feedforward_modules),
        parent_module=adapter.parent_module,
        sweep=adapter.sweep,
        init_from=None if adapter.init_from is None else adapter.init_from.replace("{task}", task),
        patience=adapter.patience,
        min_delta=adapter.min_delta or 0.0,
    )


def expand(config: RunConfig) -> list[AdapterSpec]:
    """adapters x tasks: every pair is one adapter, so that baselines train in the same run."""
    return [
        make_spec(task, family, adapter, config.training.steps)
        for family, adapter in config.adapters.items()
        for task in adapter.tasks or config.tasks
    ]
