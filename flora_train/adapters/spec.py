"""The specification of one adapter: its task, method and hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from flora_train.adapters.sparse_mask import SparseMask
from flora_train.config.adapter_schema import (
    DEFAULT_BALANCE_LOSS,
    DEFAULT_EXPERTS,
    DEFAULT_GATE_LOSS,
    DEFAULT_TOP_K,
    ROUTED,
    AdapterConfig,
    adapter_name,
)
from flora_train.config.embedding_schema import POOLING, Pooling
from flora_train.config.member_schema import MemberConfig
from flora_train.config.name_patterns import as_pairs, value_for
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.labels.spec import LabelSpec, LabelType

BASE = "__base__"
"""The name of the base model: rows with this name use no adapter."""

BASE_ID = -1
"""The id of the base model in batches."""

FEWEST_LABELS = ("no", "yes")
"""Stand for labels that are not known yet."""
DEFAULT_RANK = {"flora": 4, "lora": 8, "dora": 8, "ia3": 0, "head": 0, "meteora": 0}


@dataclass(frozen=True)
class Experts:
    """The experts of a routed adapter, and how tokens are sent to them."""

    method: str
    """That of the experts: lora, flora or ia3."""
    count: int
    """E."""
    top_k: int
    top_p: float = 1.0
    """Of the top_k experts, only as many as reach this probability together."""
    balance_loss: float = 0.0
    """Coefficient of the load-balance loss."""
    jitter: float = 0.0
    """In training, the router's input is multiplied by numbers between 1 - jitter and 1 + jitter."""


@dataclass(frozen=True)
class Gate:
    """The gate of an adapter of method meteora, and the adapters that it chooses from."""

    members: tuple[AdapterSpec, ...]
    """Each as it is alone: `name` is the member's, `init_from` where its values are from."""
    top_k: int
    loss: float
    """Coefficient of the cross-entropy between the gate and the member that a row belongs to."""
    train_members: bool
    top_p: ClassVar[float] = 1.0
    """All of the top_k members are used."""


@dataclass(frozen=True)
class HeadShape:
    """The shape of an adapter's head."""

    kind: Literal["text", "tokens"]
    """Whether it has outputs for a text, or for each token."""
    outputs: int
    """Their number."""


def head_shape(labels: LabelSpec) -> HeadShape:
    """The shape of the heads that learn these labels."""
    kind: Literal["text", "tokens"] = "tokens" if labels.task_type == "tokens" else "text"
    return HeadShape(kind, labels.outputs)


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter of a run. `make_spec` builds it from a recipe's entry; fields without a comment are that
    entry's keys."""

    name: str
    task: str
    family: str
    """The key of `adapters:` in the recipe that the adapter was expanded from."""
    method: str
    rank: int
    offset: float
    """flora: 0 for the pure variant, 1 for the residual one."""
    scaling: float
    """lora and dora: alpha / rank, or alpha / sqrt(rank) with rslora."""
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
    target_parameters: tuple[str, ...] = ()
    parent_module: str | None = None
    sweep: str | None = None
    init_from: str | None = None
    patience: int | None = None
    min_delta: float = 0.0
    lr_ratio: float = 1.0
    neftune_noise_alpha: float = 0.0
    ema_decay: float | None = None
    seed: int | None = None
    """None: the run's seed."""
    seeds_of: str | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    """(pattern, rank) in the order of the entry; the first pattern that matches a module counts."""
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    head: HeadShape | None = None
    """Of an adapter of a label task; None for all other tasks."""
    head_lr: float | None = None
    labels: LabelSpec | None = None
    """The labels that the head predicts, without weights."""
    pooling: Pooling | None = None
    """How embeddings are made, of an adapter that learns them; None for all other tasks."""
    experts: Experts | None = None
    """Of mixlora and switch; None for all other methods."""
    gate: Gate | None = None
    """Of meteora; None for all other methods."""
    mask: SparseMask | None = None
    """sparse: the entries that the adapter changes; None for all other methods."""

    @property
    def writes_text(self) -> bool:
        """Whether the adapter continues texts: those of labels have a head, and others learn embeddings."""
        return self.head is None and self.pooling is None

    @property
    def is_routed(self) -> bool:
        """Whether a router chooses, for each token, among the parts of the adapter."""
        return self.method in ROUTED

    @property
    def layer_method(self) -> str:
        """The method that computes the adapter's layers: that of the experts, if it has some."""
        return self.method if self.experts is None else self.experts.method

    @property
    def head_lr_ratio(self) -> float:
        """The learning rate of the head relative to that of the other parameters."""
        return 1.0 if self.head_lr is None else self.head_lr / self.lr

    @property
    def second_lr_ratio(self) -> float:
        """The learning rate of the second group of parameters (`Pool.rate_columns`) relative to lr: that of
        B, or 0 for the frozen members of a gate."""
        if self.gate is not None and not self.gate.train_members:
            return 0.0
        return self.lr_ratio

    @property
    def seed_name(self) -> str:
        """The name that the adapter's random numbers depend on: an adapter of a list of seeds draws what it
        would draw without the list."""
        return adapter_name(self.task, self.seeds_of) if self.seeds_of else self.name

    def seed_in(self, run_seed: int) -> int:
        """The seed of the adapter's random numbers in a run of this seed."""
        return run_seed if self.seed is None else self.seed

    @property
    def has_patterns(self) -> bool:
        """Whether rank or scaling differ between modules."""
        return bool(self.rank_pattern or self.alpha_pattern)

    def at(self, module: str) -> AdapterSpec:
        """The adapter as it is on one module: with the rank, alpha and scaling there, without patterns."""
        return _spec_at(self, module) if self.has_patterns or self.mask else self


@lru_cache(maxsize=2**16)
def _spec_at(spec: AdapterSpec, module: str) -> AdapterSpec:
    rank = value_for(dict(spec.rank_pattern), module, spec.rank)
    alpha = value_for(dict(spec.alpha_pattern), module, spec.alpha)
    return replace(
        spec,
        rank=rank,
        alpha=alpha,
        scaling=scaling_of(rank, alpha, spec.rslora),
        rank_pattern=(),
        alpha_pattern=(),
        mask=None if spec.mask is None else replace(spec.mask, module=module),
    )


def make_spec(
    task: str, family: str, adapter: AdapterConfig, *, default_steps: int, labels: LabelSpec | None = None
) -> AdapterSpec:
    """The adapter of one task that an entry of `adapters:` in a recipe describes.

    Args:
        task: Name of the task.
        family: Key of the entry; the adapter's name is `<task>-<family>`.
        adapter: The entry.
        default_steps: Training steps, if the entry sets no max_steps.
        labels: What its head predicts, if the task has labels.

    Returns:
        The specification, with defaults filled in.
    """
    experts = experts_of(adapter)
    rank = adapter.rank or DEFAULT_RANK[adapter.method if experts is None else experts.method]
    alpha = adapter.alpha or 2.0 * rank
    steps = adapter.max_steps or default_steps
    init_from = adapter.init_from
    if init_from is not None:
        init_from = init_from.replace("{task}", task)
    return AdapterSpec(
        name=adapter_name(task, family),
        task=task,
        family=family,
        method=adapter.method,
        rank=rank,
        offset=0.0 if adapter.variant == "pure" else 1.0,
        scaling=scaling_of(rank, alpha, bool(adapter.rslora)),
        alpha=alpha,
        rslora=bool(adapter.rslora),
        dropout=adapter.dropout or 0.0,
        lr=adapter.lr,
        weight_decay=adapter.weight_decay,
        max_grad_norm=adapter.max_grad_norm,
        lr_schedule=adapter.lr_schedule,
        warmup_steps=adapter.warmup_for(min(steps, default_steps)),
        max_steps=steps,
        target_modules=_hashable(adapter.target_modules),
        feedforward_modules=_hashable(adapter.feedforward_modules),
        target_parameters=tuple(adapter.target_parameters or ()),
        parent_module=adapter.parent_module,
        sweep=adapter.sweep,
        init_from=init_from,
        patience=adapter.patience,
        min_delta=adapter.min_delta or 0.0,
        lr_ratio=adapter.lr_ratio or 1.0,
        neftune_noise_alpha=adapter.neftune_noise_alpha or 0.0,
        ema_decay=adapter.ema_decay,
        seed=adapter.seed,
        seeds_of=adapter.seeds_of,
        rank_pattern=as_pairs(adapter.rank_pattern),
        alpha_pattern=as_pairs(adapter.alpha_pattern),
        exclude_modules=_hashable(adapter.exclude_modules),
        layers_to_transform=_hashable(adapter.layers_to_transform),
        layers_pattern=_hashable(adapter.layers_pattern),
        head=None if labels is None else head_shape(labels),
        head_lr=adapter.head_lr,
        labels=labels,
        experts=experts,
        gate=gate_of(family, adapter),
    )


def experts_of(adapter: AdapterConfig) -> Experts | None:
    """The experts of an entry of `adapters:`, with defaults filled in; None for a method without."""
    if adapter.method not in ("mixlora", "switch"):
        return None
    count = adapter.experts or DEFAULT_EXPERTS
    return Experts(
        method=adapter.expert or "lora",
        count=count,
        top_k=adapter.top_k or min(DEFAULT_TOP_K, count),
        top_p=adapter.top_p or 1.0,
        balance_loss=DEFAULT_BALANCE_LOSS if adapter.balance_loss is None else adapter.balance_loss,
        jitter=adapter.jitter or 0.0,
    )


def gate_of(family: str, adapter: AdapterConfig) -> Gate | None:
    """The gate of an entry of `adapters:`, with defaults filled in; None for a method without. Its loss is
    that of tasks with task_id."""
    if adapter.method != "meteora":
        return None
    members = tuple(member_spec(family, member) for member in adapter.members or ())
    return Gate(
        members=members,
        top_k=adapter.top_k or min(DEFAULT_TOP_K, len(adapter.over or ())),
        loss=DEFAULT_GATE_LOSS if adapter.gate_loss is None else adapter.gate_loss,
        train_members=bool(adapter.train_members),
    )


def member_spec(family: str, member: MemberConfig) -> AdapterSpec:
    """A member of a gate as the adapter that it is alone. family: that of the gate."""
    settings = member.model_dump(exclude={"name", "source"}, exclude_none=True)
    alone = AdapterConfig(lr=1.0, init_from=member.source, **settings)
    spec = make_spec(member.name, family, alone, default_steps=1)
    return replace(spec, name=member.name, task="")


def _hashable(value: Any) -> Any:
    """A list as a tuple, any other value as it is."""
    return tuple(value) if isinstance(value, list) else value


def scaling_of(rank: int, alpha: float, rslora: bool) -> float:
    """The factor of B A in a LoRA."""
    if rank == 0:
        return 1.0
    return alpha / rank**0.5 if rslora else alpha / rank


def rank_text(rank: int | None, smallest: int | None) -> str:
    """`8`, or `2 to 8` where the ranks of the layers differ; empty without rank."""
    if smallest is not None and smallest != rank:
        return f"{smallest} to {rank}"
    return str(rank or "")


def experts_text(spec: AdapterSpec) -> str:
    """`, 2 of 8 lora experts`; empty for an adapter without experts."""
    if spec.experts is None:
        return ""
    return f", {spec.experts.top_k} of {spec.experts.count} {spec.experts.method} experts"


LabelNames = Mapping[str, Sequence[str]]
"""Task -> its labels, for tasks whose labels were read from their rows."""


def expand(config: RunConfig, labels: LabelNames = MappingProxyType({})) -> list[AdapterSpec]:
    """One adapter for every pair of an adapter family and a task, so that baselines train in the same run.

    labels: of tasks with heads. Without them, a head has the labels that the configuration names, or two.
    """
    labels_of = {name: _configured_labels(task, labels.get(name)) for name, task in config.tasks.items()}
    specs = []
    for family, adapter in config.adapters.items():
        for task in adapter.tasks or config.tasks:
            steps = config.training.steps
            spec = make_spec(task, family, adapter, default_steps=steps, labels=labels_of.get(task))
            if spec.gate is not None and config.tasks[task].task_id is None:
                spec = replace(spec, gate=replace(spec.gate, loss=0.0))
            if config.tasks[task].embeds:
                spec = replace(spec, pooling=config.tasks[task].pooling or POOLING)
            specs.append(spec)
    return specs


def _configured_labels(task: TaskConfig, labels: Sequence[str] | None) -> LabelSpec | None:
    if not task.has_head:
        return None
    if task.regression:
        return LabelSpec("regression")
    task_type: LabelType = "multi" if task.multi_label else "single"
    if task.token_labels is not None:
        task_type = "tokens"
    return LabelSpec(task_type, tuple(labels or task.labels or FEWEST_LABELS))
