"""What can a run be told? Every key, its type, its range and its meaning, documented once, here and in task_schema.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from flora_train.config.base import LONGEST_NAME, MOST_PROCESSES, MOST_STEPS, ConfigModel, Name, PathText, Text
from flora_train.config.errors import MOST_PROBLEMS, Problem, choices, did_you_mean
from flora_train.config.evaluation_schema import EvaluationConfig
from flora_train.config.paths import at_home
from flora_train.config.speech_schema import AudioConfig
from flora_train.config.sweep import SweepConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.config.training_schema import (
    GuardConfig,
    KernelsConfig,
    MixtureConfig,
    PagingConfig,
    TrackingConfig,
    TrainingConfig,
)
from flora_train.config.unused_keys import ignored_keys


class ModelConfig(ConfigModel):
    path: PathText
    """A folder with a transformers checkpoint, or a name on the Hugging Face hub."""
    revision: str | None = None
    """Hub branch, tag or commit."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the frozen base. auto: bfloat16 where the hardware multiplies it faster, else float32."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the frozen base through bitsandbytes (needs a CUDA GPU): LLM.int8 without its outlier split, which would let a
    batch's rows see each other, or NF4. fLoRA dequantises a layer's weight when it runs, and again in the backward."""
    fsdp: bool = False
    """Divide the frozen base among the processes (FSDP2) instead of having it whole on each: less memory, more traffic. Layers are
    gathered when they run. Text models only. Writing text (sample prompts, problems) gathers all of it on every process."""
    gradient_checkpointing: Literal["off", "reentrant", "non_reentrant"] = "off"
    """Recompute activations in the backward pass: less memory, one more forward."""
    attn_implementation: str | None = None
    """Passed to transformers (eager, sdpa, flash_attention_2)."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""

    @field_validator("fsdp")
    @classmethod
    def _is_not_quantised(cls, fsdp: bool, info: ValidationInfo) -> bool:
        if fsdp and info.data.get("quantization", "none") != "none":
            raise ValueError(
                f"cannot divide a base in {info.data['quantization']}: give model.quantization=none, or leave it whole"
            )
        return fsdp


class AdapterConfig(ConfigModel):
    method: Literal["flora", "lora", "ia3"]
    """flora: W0 * (B A). lora: W0 + alpha/r B A. ia3: a learnt scale per output (feed-forward: input)."""
    rank: int | None = Field(None, ge=1, le=8192)
    """Rank r of flora (default 4) and lora (default 8); ia3 has none."""
    variant: Literal["pure", "residual"] | None = None
    """flora only. residual (default): W0 * (1 + B A). pure: W0 * (B A), the paper's."""
    alpha: float | None = Field(None, gt=0, le=1_000_000)
    """lora only: the update is scaled by alpha / rank. Default: 2 x rank."""
    rslora: bool | None = None
    """lora only: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """lora only: dropout on the input of A, seeded per adapter and step."""
    lr: float = Field(gt=0, le=1e30)
    """Peak learning rate. Multiplicative methods want 10 to 50 times LoRA's: sweep per method."""
    weight_decay: float = Field(0.0, ge=0, le=10_000)
    """Decoupled decay towards zero. For ia3 and pure flora zero is not the identity: leave it at 0."""
    max_grad_norm: float | None = Field(1.0, gt=0, le=1e30)
    """Clip this adapter's own gradient norm; null: never."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after warm-up, by the adapter's own steps."""
    max_steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    """The adapter leaves the batch after this many steps of its own. Default: training.steps."""
    patience: int | None = Field(None, ge=1, le=MOST_STEPS)
    """The adapter also leaves after so many held-out evaluations in a row (one each evaluation.interval steps) without a better loss;
    the others share its part of the batch. Default: it stays."""
    min_delta: float | None = Field(None, gt=0, le=1_000_000, validate_default=True)
    """With patience: a loss is better if it is lower by more than this, in nats a token. Default: by anything."""
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS)
    """Linear warm-up over the adapter's own first steps."""
    target_modules: Annotated[list[Text], Field(min_length=1)] | Literal["default", "all-linear"] = "default"
    """Module name endings, or all-linear (every linear layer that runs in rows, but the output head), or default: all-linear
    for flora and lora; keys, values and the feed-forward output for ia3 (PEFT's table per architecture)."""
    parent_module: Text | None = None
    """Adapt only targets below modules of this name: decoder, of a speech model, whose encoder is then shared by all such adapters."""
    feedforward_modules: list[Text] | None = None
    """ia3 only: targets whose input is scaled instead of the output. Default: PEFT's table."""
    tasks: list[Name] | None = Field(None, min_length=1)
    """Train this adapter on these tasks only. Default: all."""
    init_from: PathText | None = None
    """Begin with the numbers of a PEFT adapter (LORA, IA3, or HIRA for flora), a folder or a name on the hub, instead of the identity. A
    residual flora can begin close to a LORA, too. With evaluation.interval, step 0 is judged then.
    {task} in it stands for the name of the task: outputs/before/adapters/{task}-lora."""
    sweep: Name | None = None
    """The entry of `adapters` that this adapter was made from, where a list of values stood for one; written by the program."""

    @field_validator("rank", "variant", "alpha", "rslora", "dropout", "feedforward_modules")
    @classmethod
    def _belongs_to_the_method(cls, value: Any, info: ValidationInfo) -> Any:
        method, owners = info.data.get("method"), OWNERS[str(info.field_name)]
        if value is not None and method is not None and method not in owners:
            raise ValueError(f"has no meaning for method {method}; it belongs to {' and '.join(owners)}: remove it")
        return value

    @field_validator("weight_decay")
    @classmethod
    def _decays(cls, weight_decay: float, info: ValidationInfo) -> float:
        lr = info.data.get("lr")
        if lr is not None and lr * weight_decay > 1:
            raise ValueError(
                f"times lr = {lr:g} is more than 1: every step would turn the adapter's numbers around; make it smaller"
            )
        return weight_decay

    @field_validator("min_delta")
    @classmethod
    def _belongs_to_patience(cls, min_delta: float | None, info: ValidationInfo) -> float | None:
        if min_delta is not None and info.data.get("patience") is None:
            raise ValueError("says what patience waits for, and there is no patience: give both, or remove it")
        return min_delta

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, warmup_steps: int, info: ValidationInfo) -> int:
        if hint := _warmup_hint(warmup_steps, "max_steps", info.data.get("max_steps")):
            raise ValueError(hint)
        return warmup_steps


OWNERS = {
    "rank": ("flora", "lora"),
    "variant": ("flora",),
    "alpha": ("lora",),
    "rslora": ("lora",),
    "dropout": ("lora",),
    "feedforward_modules": ("ia3",),
}
"""Option of an adapter -> the methods that have it; options that are not here belong to all."""


def _warmup_hint(warmup_steps: int, limit_key: str, limit: int | None) -> str | None:
    if limit is None or warmup_steps < limit:
        return None
    return f"leaves no step after warm-up: make it smaller than {limit_key} = {limit}"


class Contradictions(ValueError):
    """Values of several sections that are each valid but do not go together."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(str(problem) for problem in problems))


class RunConfig(ConfigModel):
    name: Name
    """Name of the run."""
    output_dir: PathText | None = None
    """Run folder. Default: outputs/<name>."""
    overwrite: bool = False
    """If output_dir holds a run already: false stops, true deletes the files that the run wrote (its manifest, in run.json, names them). A run that
    another process trains, or whose run.json has no manifest, is not deleted."""
    resume: bool = False
    """If output_dir holds this run already: go on from its last checkpoint, or keep it if it is finished."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of initialisation, mixture, splits and dropout."""
    num_processes: int | None = Field(None, ge=1, le=100_000)
    """Processes that the launcher must have started; checked at the start of the run."""
    num_threads: int | None = Field(None, ge=1, le=MOST_PROCESSES)
    """CPU threads per process. Default: the machine's cores, shared among the processes (accelerate's launcher would
    leave it at one)."""
    model: ModelConfig
    tasks: dict[Name, TaskConfig] = Field(min_length=1)
    adapters: dict[Name, AdapterConfig] = Field(min_length=1)
    mixture: MixtureConfig = MixtureConfig()
    training: TrainingConfig
    audio: AudioConfig = AudioConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig = SweepConfig()
    guard: GuardConfig = GuardConfig()
    paging: PagingConfig = PagingConfig()
    kernels: KernelsConfig = KernelsConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("resume")
    @classmethod
    def _one_way_with_what_is_there(cls, resume: bool, info: ValidationInfo) -> bool:
        if resume and info.data.get("overwrite"):
            raise ValueError("contradicts overwrite=true, which deletes what could be resumed: give one of them")
        return resume

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if found := disagreements(
            list(self.tasks), {name: (a.tasks, a.warmup_steps) for name, a in self.adapters.items()}, self.training.steps
        ):
            raise Contradictions(found)
        if problem := _one_kind_of_task(self.tasks):
            raise Contradictions([problem])
        if ignored := ignored_keys(self.tasks):
            raise Contradictions(ignored)
        if late := [rung for rung in self.sweep.rungs or () if rung >= self.training.steps]:
            hint = f"is no step before the end: rungs are before training.steps = {self.training.steps}"
            raise Contradictions([Problem("sweep.rungs", late[0], hint)])
        if self.sweep.strategy == "halving" and not any(adapter.sweep for adapter in self.adapters.values()):
            hint = "has nothing to halve: no adapter has a list of values, such as adapters.NAME.lr=[1e-3,2e-3]"
            raise Contradictions([Problem("sweep.strategy", "halving", hint)])
        for name, adapter in self.adapters.items():
            if adapter.patience is not None and self.evaluation.interval is None:
                hint = f"adapters.{name}.patience counts evaluations during training, and there are none: set it to some number of steps"
                raise Contradictions([Problem("evaluation.interval", None, hint)])
        return self

    @property
    def adapter_names(self) -> list[str]:
        """Names of all adapters, in the order of the bank: every entry of `adapters` with each of its tasks."""
        return [adapter_name(task, family) for family, adapter in self.adapters.items() for task in adapter.tasks or self.tasks]

    @property
    def folder(self) -> str:
        """The run folder, relative to the working directory unless the user gave an absolute path."""
        return str(at_home(self.output_dir or f"outputs/{self.name}"))


MOST_ADAPTERS = 100_000
"""Of one run: families times their tasks."""


def disagreements(
    tasks: Collection[str], adapters: Mapping[str, tuple[Sequence[str] | None, int]], steps: int | None
) -> list[Problem]:
    """What sections contradict in each other.

    tasks: their names; adapters: name -> (its tasks, None for all; warmup_steps); steps: of the run, None if not known.
    """
    count = sum(len(tasks if chosen is None else chosen) for chosen, _ in adapters.values())
    if count > MOST_ADAPTERS:
        hint = f"are {count:,}, each on every one of its tasks: at most {MOST_ADAPTERS:,} train in one run; divide them among several"
        return [Problem("adapters", None, hint)]
    problems = [
        Problem(f"{section}.{name}", None, RESERVED)
        for section, names in (("tasks", tasks), ("adapters", adapters))
        for name in names
        if name.lower() == "base"
    ]
    known = frozenset(tasks)
    for name, (chosen, warmup_steps) in adapters.items():
        for task in chosen or ():
            if task not in known:
                hint = f"is not a task; tasks are {choices(tasks)}.{did_you_mean(task, tasks)}"
                problems.append(Problem(f"adapters.{name}.tasks", task, hint))
        if hint := _warmup_hint(warmup_steps, "training.steps", steps) or "":
            problems.append(Problem(f"adapters.{name}.warmup_steps", warmup_steps, hint))
        if len(problems) >= MOST_PROBLEMS:
            return problems
    names = [adapter_name(task, name) for name, (chosen, _) in adapters.items() for task in chosen or tasks]
    return problems + _unusable_names(names)


def _unusable_names(names: Sequence[str]) -> list[Problem]:
    """Every adapter has files of its own, which its name must tell apart on every file system."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    problems = [
        Problem("adapters", name, "two adapters (task-adapter) would have this name: rename a task or adapter") for name in twice
    ]
    first: dict[str, str] = {}
    for name in names:
        if len(name) > LONGEST_NAME:
            hint = f"is the name of an adapter (task-adapter) of more than {LONGEST_NAME} characters, too long for its files: rename the task or adapter"
            problems.append(Problem("adapters", name, hint))
        elif (other := first.setdefault(name.lower(), name)) != name:
            hint = f"and {other} are adapters (task-adapter) whose names differ in case only, which not every file system tells apart: rename one"
            problems.append(Problem("adapters", name, hint))
    return problems[:MOST_PROBLEMS]


RESERVED = "is what reports call the base model: rename it"


def _one_kind_of_task(tasks: Mapping[str, TaskConfig]) -> Problem | None:
    """A base model reads text or hears speech."""
    spoken = [name for name, task in tasks.items() if task.speech is not None]
    if not spoken or len(spoken) == len(tasks):
        return None
    text = next(name for name in tasks if name not in spoken)
    hint = f"has none, and tasks.{spoken[0]} is speech: one base model does not do both; make two runs"
    return Problem(f"tasks.{text}.speech", None, hint)


def adapter_name(task: str, adapter: str) -> str:
    """The public name of `adapter` trained on `task`: its folder, its column in reports."""
    return f"{task}-{adapter}"
