"""One entry of `adapters`: method, size, optimization, target modules and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from flora_train.config.base import MOST_STEPS, ConfigModel, Name, PathText, Text
from flora_train.config.member_schema import MemberConfig, check_distinct
from flora_train.config.name_patterns import (
    MOST_LAYERS,
    Regex,
    check_layers_pattern,
    check_pattern_keys,
    check_regex,
    check_target_regex,
    is_regex,
)

Rank = Annotated[int, Field(ge=1, le=8192)]
Alpha = Annotated[float, Field(gt=0, le=1_000_000)]
LayerIndex = Annotated[int, Field(ge=0, le=MOST_LAYERS)]


class AdapterConfig(ConfigModel):
    method: Literal["flora", "lora", "dora", "ia3", "head", "mixlora", "meteora", "switch"]
    """flora: W0 * (B A), elementwise. lora: W0 + alpha / rank * B A. dora: the weight of lora, each of whose
    rows is given a learned norm. ia3: a learned scale for each output, and for each input of feed-forward
    layers. head: no layer is changed, and only a head is trained, for tasks with labels (the baseline).
    mixlora: a router in each feed-forward block sends every token to some of several expert adapters.
    meteora: a gate on each layer chooses among adapters that exist already. switch: one router chooses, for
    each token, the experts of all layers."""
    expert: Literal["lora", "flora", "ia3"] | None = None
    """mixlora and switch: method of the experts (and of mixlora's adapters in the attention layers).
    Default: lora."""
    experts: int | None = Field(None, ge=1, le=1024)
    """mixlora and switch: number of experts. Default: 8."""
    over: Annotated[list[PathText], Field(min_length=1, max_length=1024)] | None = Field(
        None, validate_default=True
    )
    """meteora: the adapters that the gate chooses from: folders of PEFT adapters (LORA, IA3, or HIRA of
    fLoRA) or their names on the hub, or names of adapters of this run that are trained already, in a finished
    run that is extended. Their ranks and layers may differ: on a layer that one of them does not adapt, it
    adds nothing."""
    top_k: int | None = Field(None, ge=1, le=1024)
    """mixlora, meteora and switch: number of experts that a token is sent to. Their weights are their
    probabilities, divided by the sum of these. Default: 2, or 1 where there is only one."""
    top_p: float | None = Field(None, gt=0, le=1)
    """mixlora: of the top_k experts, only as many as reach this probability together, the most probable
    first. Default: all."""
    balance_loss: float | None = Field(None, ge=0, le=1_000_000)
    """mixlora and switch: coefficient of the load-balance loss of the router. Default: 0.01."""
    jitter: float | None = Field(None, ge=0, lt=1)
    """mixlora and switch: in training, the router reads its input times random numbers between 1 - jitter
    and 1 + jitter. Default: 0."""
    gate_loss: float | None = Field(None, ge=0, le=1_000_000)
    """meteora: coefficient of the cross-entropy between the gate and the member that tasks.*.task_id names
    for a row, the mean over layers and learnt tokens. Default: 1 for tasks with task_id, 0 for others."""
    train_members: bool | None = None
    """meteora: also train the adapters that the gate chooses from, as copies. Default: false."""
    members: list[MemberConfig] | None = None
    """meteora: what the adapters in over are. Set by the program, from their files."""
    rank: Rank | None = None
    """Rank of B A, for flora, lora and dora. Default: 4 for flora, 8 for lora and dora; with init_from, that
    of the PEFT adapter."""
    rank_pattern: dict[Text, Rank] | None = None
    """Other ranks for some layers, as in PEFT: {pattern: rank}. A pattern is the end of a module name, from a
    dot on, or a regular expression for it; the first that matches counts. Default: rank everywhere; with
    init_from, that of the PEFT adapter."""
    variant: Literal["pure", "residual"] | None = None
    """flora only. residual: W0 * (1 + B A). pure: W0 * (B A), as in the paper. Default: residual; with
    init_from, that of the PEFT adapter."""
    alpha: Alpha | None = None
    """lora and dora: the update is scaled by alpha / rank. Default: 2 x rank; with init_from, that of the
    PEFT adapter."""
    alpha_pattern: dict[Text, Alpha] | None = None
    """lora and dora: other alphas for some layers, as in PEFT: {pattern: alpha}, with patterns as in
    rank_pattern. Default: alpha everywhere; with init_from, that of the PEFT adapter."""
    rslora: bool | None = None
    """lora and dora: scale the update by alpha / sqrt(rank) instead (Kalajdzievski 2023). Default: false;
    with init_from, that of the PEFT adapter."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """lora and dora: dropout probability on the input of A, seeded for each adapter and step. With dora, as
    in PEFT, the layer's own weight gets that input, too, where its rows are given their norm. Default: 0."""
    neftune_noise_alpha: float | None = Field(None, gt=0, le=1_000_000)
    """NEFTune (Jain et al. 2024): in training, uniform noise of at most alpha / sqrt(L d) is added to the
    input embeddings of this adapter's rows, for documents of L tokens and embeddings of width d. Seeded for
    each adapter, step and example. Usual values are 5 to 15. Default: no noise."""
    lr: float = Field(gt=0, le=1e30)
    """Peak learning rate. flora and ia3 need 10 to 50 times the learning rate of lora: sweep it for each
    method."""
    lr_ratio: float | None = Field(None, gt=0, le=1_000_000)
    """flora, lora and dora: the learning rate of B (and, as in PEFT, of dora's norms) is lr_ratio x lr, that
    of A is lr (LoRA+, Hayou et al. 2024, who recommend 16 for lora). meteora: with train_members, of the B of
    its members. Default: 1."""
    head_lr: float | None = Field(None, gt=0, le=1e30)
    """Tasks with labels: peak learning rate of the head, which follows the same schedule. Default: lr."""
    weight_decay: float = Field(0.0, ge=0, le=10_000)
    """Decoupled weight decay towards zero. Zero is not the identity for ia3 and pure flora: leave it at 0
    there."""
    max_grad_norm: float | None = Field(1.0, gt=0, le=1e30)
    """Largest norm of this adapter's own gradient, which is clipped to it. null: no clipping."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up, over the adapter's own steps: constant, or decaying to zero linearly
    or as half a cosine."""
    max_steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Number of the adapter's own steps, after which it is no longer trained. Default: training.steps."""
    patience: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Early stopping: number of evaluations in a row (one every evaluation.interval steps) without a better
    held-out loss (or figure: tasks.*.select_by), after which the adapter is no longer trained and the others
    share its part of the batch. Default: no early stopping."""
    min_delta: float | None = Field(None, gt=0, le=1_000_000, validate_default=True)
    """With patience: decrease of the loss that counts as better, in nats per token, or in the loss of
    preferences; with tasks.*.select_by, the improvement of the figure. Default: any."""
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS)
    """Number of the adapter's first steps over which the learning rate rises linearly."""
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    """Warm-up as a share of the adapter's steps (max_steps, at most training.steps), rounded to whole steps,
    in place of warmup_steps. Default: warmup_steps counts."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Evaluate, select and export an exponential moving average of the weights instead of the last weights:
    after each of its own steps, the adapter's average keeps ema_decay of what it was, with Adam's correction
    of the first steps. Training continues from the weights themselves. Default: no average."""
    target_parameters: Annotated[list[Text], Field(min_length=1)] | None = None
    """flora, lora and ia3: weights of fused experts that the adapter changes beside target_modules, as in
    PEFT: a list of parameter names or their endings, such as mlp.experts.gate_up_proj and
    mlp.experts.down_proj. The adapter has parameters for each expert, and every token uses those of its row's
    adapter. Without dropout and init_from. Default: none."""
    target_modules: list[Text] | Literal["default", "all-linear", "query-key"] | Regex = "default"
    """Layers that the adapter changes: a list of module names or their endings, all-linear (every linear
    layer but the output head), or query-key (the query and key projections of attention, whatever the
    architecture calls them: q_proj and k_proj, or the one matrix that has them fused with the values, such as
    c_attn). A list may contain query-key beside names. Other text is, as in PEFT, a regular expression that
    must match complete module names, such as '.*layers[.][0-9][.].*_proj'. default: with init_from, the
    layers of the PEFT adapter; else all-linear for flora, lora and dora, and keys, values and the
    feed-forward output for ia3 (PEFT's table, where it has the architecture). An empty list beside
    target_parameters: those alone."""
    exclude_modules: Annotated[list[Text], Field(min_length=1)] | Regex | None = None
    """Modules among the targets that the adapter does not change, as in PEFT: a list of names or their
    endings, or one regular expression for complete names. Default: none."""
    layers_to_transform: LayerIndex | Annotated[list[LayerIndex], Field(min_length=1)] | None = None
    """Indices, from 0, of the layers that are adapted, as in PEFT; targets outside of them are left out. Not
    with a regular expression in target_modules. Default: all layers."""
    layers_pattern: Annotated[list[Text], Field(min_length=1)] | Text | None = Field(
        None, validate_default=True
    )
    """With layers_to_transform: the name of the list of layers, such as layers or h, that it counts in.
    Default: the first numbered part of a module's name, from the second part on."""
    parent_module: Text | None = None
    """Adapt only layers inside a module of this name. With decoder, the adapters of a speech model share its
    encoder. Default: the whole model."""
    feedforward_modules: list[Text] | None = None
    """ia3 only: the target modules (and parameters) whose input is scaled instead of their output. Default:
    PEFT's table, and down_proj of fused experts; with init_from, those of the PEFT adapter."""
    tasks: list[Name] | None = Field(None, min_length=1)
    """Tasks that this adapter is trained on. The name of a task with split_by stands for all tasks that are
    made from it. Default: all tasks."""
    init_from: PathText | None = None
    """Start from the parameters of a PEFT adapter (LORA, IA3, or HIRA for flora) instead of the identity: its
    folder, or its name on the hub. A residual flora can also start close to a LORA; a mixlora starts from the
    folder of an exported one, or from one in MixLoRA's published layout. {task} in it stands for the name of
    the task, as in outputs/before/adapters/{task}-lora. rank, alpha, their patterns, rslora, variant, expert,
    experts, top_k, target_modules and feedforward_modules are read from its files where they are not given.
    With evaluation.interval, step 0 is evaluated. Default: the identity."""
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    """Seed of this adapter's initialization, dropout and NEFTune noise; the examples and their order are
    those of the run's seed. A list of seeds makes an adapter for each, and the report gives mean and standard
    deviation over them. Default: seed of the run."""
    sweep: Name | None = None
    """The entry of `adapters` that this adapter was expanded from, where lists of values stood for other keys
    than seed. Set by the program."""
    seeds_of: Name | None = None
    """What the name of this adapter would be without its seed, where a list of seeds stood in its entry. Set
    by the program."""

    @field_validator(
        "expert",
        "experts",
        "over",
        "top_k",
        "top_p",
        "balance_loss",
        "jitter",
        "gate_loss",
        "train_members",
        "members",
        "rank",
        "rank_pattern",
        "variant",
        "alpha",
        "alpha_pattern",
        "rslora",
        "dropout",
        "lr_ratio",
        "target_parameters",
        "feedforward_modules",
    )
    @classmethod
    def _belongs_to_the_method(cls, value: Any, info: ValidationInfo) -> Any:
        method, owners = info.data.get("method"), OWNERS[str(info.field_name)]
        if value is not None and method is not None and method not in owners:
            raise ValueError(f"has no meaning for method {method}; it belongs to {listed(owners)}: remove it")
        if value is not None and method in ("mixlora", "switch") and info.field_name in EXPERT_OWNERS:
            expert, owners = info.data.get("expert") or "lora", EXPERT_OWNERS[str(info.field_name)]
            if expert not in owners:
                hint = f"it belongs to {listed(owners)}: remove it"
                raise ValueError(f"has no meaning for experts of method {expert}; {hint}")
        return value

    @field_validator("top_k")
    @classmethod
    def _has_experts(cls, top_k: int | None, info: ValidationInfo) -> int | None:
        if top_k is None:
            return None
        experts, key = info.data.get("experts") or DEFAULT_EXPERTS, "experts"
        if info.data.get("method") == "meteora":
            experts, key = len(info.data.get("over") or ()), "adapters in over"
        if experts and top_k > experts:
            raise ValueError(f"is more than the {experts} {key}: lower it")
        return top_k

    @field_validator("over")
    @classmethod
    def _a_gate_has_members(cls, over: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if over is None and info.data.get("method") == "meteora":
            raise ValueError("is required by method meteora: list the adapters that its gate chooses from")
        check_distinct(over or ())
        return over

    @field_validator("lr_ratio")
    @classmethod
    def _frozen_members_have_no_rate(cls, ratio: float | None, info: ValidationInfo) -> float | None:
        if ratio is not None and info.data.get("method") == "meteora" and not info.data.get("train_members"):
            raise ValueError("requires train_members: set it to true, or remove this key")
        return ratio

    @field_validator(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "parent_module",
        "init_from",
    )
    @classmethod
    def _layers_of_members(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("method") == "meteora" and value not in (None, "default"):
            hint = "has no meaning for method meteora, whose layers and initial values are those of the "
            raise ValueError(f"{hint}adapters in over: remove it")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_compile(cls, pattern: dict[str, Any] | None) -> dict[str, Any] | None:
        check_pattern_keys(pattern or {})
        return pattern

    @field_validator("target_parameters")
    @classmethod
    def _without_dropout(cls, parameters: list[str] | None, info: ValidationInfo) -> list[str] | None:
        dropout = info.data.get("dropout")
        if parameters is not None and dropout:
            raise ValueError(f"cannot be combined with dropout = {dropout:g}, as in PEFT: set dropout to 0")
        return parameters

    @field_validator("target_modules")
    @classmethod
    def _has_targets(cls, modules: Any, info: ValidationInfo) -> Any:
        if modules == [] and info.data.get("target_parameters") is None:
            raise ValueError("must have at least 1 item(s), unless there are target_parameters")
        return modules

    @field_validator("init_from")
    @classmethod
    def _experts_begin_as_identity(cls, source: str | None, info: ValidationInfo) -> str | None:
        if source is not None and info.data.get("target_parameters") is not None:
            raise ValueError("cannot be combined with target_parameters: remove one of them")
        return source

    @field_validator("target_modules", mode="before")
    @classmethod
    def _selects(cls, selection: Any) -> Any:
        return check_target_regex(selection) if isinstance(selection, str) else selection

    @field_validator(
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "parent_module"
    )
    @classmethod
    def _has_layers(cls, selection: Any, info: ValidationInfo) -> Any:
        if info.data.get("method") == "head" and selection not in (None, "default"):
            raise ValueError("has no meaning for method head, which changes no layer: remove it")
        return selection

    @field_validator("exclude_modules")
    @classmethod
    def _excludes(cls, exclude: list[str] | str | None) -> list[str] | str | None:
        if isinstance(exclude, str):
            check_regex(exclude)
        return exclude

    @field_validator("layers_to_transform")
    @classmethod
    def _layers_of_names(cls, layers: Any, info: ValidationInfo) -> Any:
        if layers is not None and is_regex(info.data.get("target_modules")):
            raise ValueError(
                "cannot be combined with a regular expression in target_modules, as in PEFT: "
                "put the layers into the expression, or give target_modules a list of names"
            )
        return [layers] if isinstance(layers, int) else layers

    @field_validator("layers_pattern")
    @classmethod
    def _requires_layers(cls, pattern: list[str] | str | None, info: ValidationInfo) -> Any:
        if pattern is None:
            return pattern
        if info.data.get("layers_to_transform") is None:
            raise ValueError("requires layers_to_transform: set it, or remove this key")
        names = [pattern] if isinstance(pattern, str) else pattern
        for name in names:
            check_layers_pattern(name)
        return names

    @field_validator("weight_decay")
    @classmethod
    def _decays(cls, weight_decay: float, info: ValidationInfo) -> float:
        lr, ratio = info.data.get("lr"), info.data.get("lr_ratio") or 1.0
        head_lr = info.data.get("head_lr")
        if head_lr is not None and head_lr * weight_decay > 1:
            effect = "every step would flip the signs of the head's weights"
            raise ValueError(f"times head_lr = {head_lr:g} is more than 1, so that {effect}: lower it")
        if lr is not None and lr * max(1.0, ratio) * weight_decay > 1:
            rate = f"lr = {lr:g}" if ratio <= 1 else f"lr x lr_ratio = {lr * ratio:g}"
            effect = "every step would flip the signs of the weights"
            raise ValueError(f"times {rate} is more than 1, so that {effect}: lower it")
        return weight_decay

    @field_validator("min_delta")
    @classmethod
    def _requires_patience(cls, min_delta: float | None, info: ValidationInfo) -> float | None:
        if min_delta is not None and info.data.get("patience") is None:
            raise ValueError("requires patience: set it, or remove this key")
        return min_delta

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, warmup_steps: int, info: ValidationInfo) -> int:
        if hint := warmup_hint(warmup_steps, "max_steps", info.data.get("max_steps")):
            raise ValueError(hint)
        return warmup_steps

    @field_validator("warmup_ratio")
    @classmethod
    def _one_warmup(cls, warmup_ratio: float | None, info: ValidationInfo) -> float | None:
        steps = info.data.get("warmup_steps")
        if warmup_ratio is not None and steps:
            raise ValueError(f"and warmup_steps = {steps} both set the warm-up: remove one of them")
        return warmup_ratio

    @property
    def balances_load(self) -> bool:
        """Whether the load of its experts is balanced, which couples the rows of a draw."""
        return self.method in ("mixlora", "switch") and self.balance_loss != 0

    @property
    def is_random(self) -> bool:
        """Whether its seed changes anything but a head."""
        if self.dropout or self.neftune_noise_alpha:
            return True
        if self.method in ROUTED:
            return True
        one_rank = self.rank == 1 and not self.rank_pattern
        all_ones = self.variant == "pure" and one_rank
        return self.method not in ("ia3", "head") and not all_ones and self.init_from is None

    def warmup_for(self, steps: int) -> int:
        """Warm-up steps of an adapter of `steps` steps, at least one of which follows the warm-up."""
        if self.warmup_ratio is None:
            return self.warmup_steps
        return min(round(self.warmup_ratio * steps), steps - 1)


ROUTED = ("mixlora", "meteora", "switch")
"""Methods in which a router chooses among experts, or a gate among adapters."""
OWNERS = {
    "expert": ("mixlora", "switch"),
    "experts": ("mixlora", "switch"),
    "over": ("meteora",),
    "top_k": ("mixlora", "meteora", "switch"),
    "top_p": ("mixlora",),
    "balance_loss": ("mixlora", "switch"),
    "jitter": ("mixlora", "switch"),
    "gate_loss": ("meteora",),
    "train_members": ("meteora",),
    "members": ("meteora",),
    "rank": ("flora", "lora", "dora", "mixlora", "switch"),
    "rank_pattern": ("flora", "lora", "dora"),
    "variant": ("flora",),
    "alpha": ("lora", "dora", "mixlora", "switch"),
    "alpha_pattern": ("lora", "dora"),
    "rslora": ("lora", "dora", "mixlora", "switch"),
    "dropout": ("lora", "dora", "mixlora", "switch"),
    "lr_ratio": ("flora", "lora", "dora", "mixlora", "switch", "meteora"),
    "target_parameters": ("flora", "lora", "ia3"),
    "feedforward_modules": ("ia3",),
}
"""Key of an adapter -> the methods that have it. Keys that are not listed belong to all methods."""
EXPERT_OWNERS = {
    "rank": ("lora", "flora"),
    "alpha": ("lora",),
    "rslora": ("lora",),
    "dropout": ("lora",),
    "lr_ratio": ("lora", "flora"),
}
"""Key of a routed adapter -> the methods of experts that have it."""
DEFAULT_EXPERTS = 8
DEFAULT_TOP_K = 2
DEFAULT_BALANCE_LOSS = 0.01
DEFAULT_GATE_LOSS = 1.0


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def warmup_hint(warmup_steps: int, limit_key: str, limit: int | None) -> str | None:
    """Why a warm-up is too long for `limit` steps, or None."""
    if limit is None or warmup_steps < limit:
        return None
    return (
        f"leaves no step after the warm-up: make it smaller than {limit_key} = {limit}, or use warmup_ratio"
    )


def adapter_name(task: str, adapter: str) -> str:
    """The public name of `adapter` trained on `task`: its folder, its column in reports."""
    return f"{task}-{adapter}"
