"""Types of report.json, which the page, the terminal, cards, figures and trackers show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from flora_train.adapters.spec import rank_text
from flora_train.config.base import MOST_STEPS
from flora_train.evaluation.code.score_types import CodeSuite
from flora_train.evaluation.figures.result_types import ConfusionMatrix, FigureResult
from flora_train.evaluation.preferences.score_types import PreferenceResult
from flora_train.evaluation.result_model import (
    Confidence,
    Count,
    Interval,
    Measurement,
    Number,
    ResultModel,
    Seconds,
    SparseModel,
    Text,
)
from flora_train.evaluation.routing.load_types import ExpertLoad
from flora_train.evaluation.speech.score_types import SpeechResults
from flora_train.runtime.environment import Environment

SCHEMA_VERSION: Final = 7
"""Version of report.json; raised whenever a reader of an older version would miss or misread something."""

Step = Annotated[Count, Field(le=MOST_STEPS)]
Share = Annotated[Number, Field(ge=0, le=1)]
TaskObjective = Literal["sft", "dpo", "ipo", "orpo", "kto", "labels", "embeddings"]
LossPoint = tuple[Step, Measurement | None]
"""A step, and the loss there: nats per token, or the objective's mean loss of a preference task."""
TokenPoint = tuple[Step, Count]
"""A step, and the tokens drawn until then."""


class JointSpeedup(ResultModel):
    """Forward and backward of one step's rows, trained jointly and one adapter after the other."""

    joint_seconds: Annotated[Seconds, Field(gt=0)]
    separate_seconds: Seconds
    adapters: Count
    measured: Count | None = None
    """Adapters that were timed; `separate_seconds` is an estimate where these are not all. None: all."""


class RunFacts(Environment, ResultModel):
    """Machine, versions, settings and costs of a run. Values that were not recorded are None or empty."""

    model: Text | None = None
    """The base model's `model.path`."""
    base_parameters: Count | None = None
    """Number of parameters of the base model."""
    dtype: Text | None = None
    """Of the base model's weights."""
    device: Text | None = None
    processes: Count | None = None
    peak_memory_bytes: Count | None = None
    """Of the main process."""
    finished: Text | None = None
    """ISO 8601 time at which training ended."""
    seconds: dict[Text, Seconds] = {}
    """Stage -> wall-clock time."""
    time_shares: dict[Text, Number] = {}
    """Part of a training step -> its share of the step."""
    joined: dict[Text, Step] = {}
    """Tasks that were added to the run -> their first step."""
    joint_speedup: JointSpeedup | None = None
    hub_commits: dict[Text, Text] = {}
    """Repository on the hub and revision -> the commit that was read."""
    not_for_plain_peft: dict[Text, Text] = {}
    """Adapter whose exported folder plain PEFT does not load -> the reason."""
    config: Text = ""
    """The resolved configuration, as YAML."""
    origin_differences: tuple[Text, ...] = ()
    """How base or data of an evaluation differ from those that the run was trained with."""


class UnusableClips(ResultModel):
    """Clips that were left out for one reason."""

    clips: Count
    first: tuple[Text, ...]
    """Paths of the first of them."""


class SplitSummary(ResultModel):
    """What became of the rows of a split."""

    rows: Count = 0
    unsampled: Count = 0
    """Left out by max_examples."""
    empty: Count = 0
    """Rows without text to learn."""
    over_long_truncated: Count = 0
    over_long_split: Count = 0
    over_long_dropped: Count = 0
    prompt_too_long: Count = 0
    """Rows whose prompt alone fills max_length."""
    documents: Count = 0
    """Texts that are learned: a long row may give several, and several may be packed into one example."""
    examples: Count = 0
    tokens: Count = 0
    label_tokens: Count = 0
    """Tokens that the loss is computed on."""
    unusable: dict[Text, UnusableClips] = {}
    """Speech: reason -> clips that were left out."""
    seconds: Seconds = 0.0
    """Speech: length of all clips used."""
    special_tokens: dict[Text, Count] = {}
    """Special token -> number of times that rows hold it as text."""


class TaskSummary(ResultModel):
    """A task's data, and how much of it was drawn."""

    name: Text
    weight: Number
    origin: Text | None = None
    """Where the examples come from."""
    hub: Text | None = None
    """Data set on the hub."""
    license: Text | None = None
    spoken_language: Text | None = None
    """Language code of a speech task."""
    train: SplitSummary
    validation: SplitSummary
    test: SplitSummary | None = None
    tokens_drawn: Count
    target_share: Share
    """Share of all tokens that the mixture aims at."""
    epochs: Number
    data_hash: Text
    """SHA-256 of all examples."""
    heldout_hash: Text | None = None
    """SHA-256 of the held-out examples. None: not recorded."""
    test_hash: Text | None = None
    """SHA-256 of the test examples. None: not recorded."""


class Quarantine(ResultModel):
    """The step after which the guard stopped training an adapter."""

    step: Step
    reason: Text


class Retirement(ResultModel):
    """The step after which an adapter was trained no more, although the run went on."""

    step: Step
    reason: Literal["patience", "halving"]


class AdapterFacts(SparseModel):
    """Hyper-parameters of an adapter, and what happened to it during training."""

    written_if_set = ("seed", "seeds_of")

    name: Text
    task: Text
    family: Text
    """Key of the recipe's `adapters`."""
    seed: Count | None = None
    """None: the run's."""
    seeds_of: Text | None = None
    """The family without its seed, where the recipe lists several seeds."""
    method: Text
    rank: Count | None
    """The largest rank of its layers."""
    smallest_rank: Count | None = None
    """Where the ranks of its layers differ (rank_pattern)."""
    variant: Text | None
    """fLoRA: pure or residual."""
    lr: Number
    parameters: Count
    tokens: Count
    """Tokens that it was trained on."""
    skipped_steps: Count = 0
    """Steps whose gradient was not finite."""
    selected_step: Step | None = None
    """Step of the best checkpoint, which is evaluated and exported. None: the last."""
    rollbacks: Count = 0
    quarantined: Quarantine | None = None
    retired: Retirement | None = None

    @property
    def rank_text(self) -> str:
        """The rank, or the smallest and the largest one; empty without rank."""
        return rank_text(self.rank, self.smallest_rank)


class HeldoutScore(ResultModel):
    """Held-out loss of the base model or of an adapter. What is not finite is None."""

    name: Text
    family: Text
    bits_per_byte: Interval
    loss: Measurement | None
    """Nats per token."""
    perplexity: Number | None
    """Per token."""


class BaseResult(HeldoutScore):
    """Held-out loss of the base model."""

    name: Literal["base"] = "base"
    family: Literal["base"] = "base"


class ContenderResult(HeldoutScore):
    """Held-out loss of an adapter."""

    difference_to_base: Interval
    """Bits per byte, negative where the adapter is better."""
    best: bool
    """Whether it has the lowest bits per byte of its task; of a preference task, the lowest mean loss of the
    objective. Of seeds only their mean can have it: no seed is better than another."""


class Difference(ResultModel):
    """Bits per byte of the family `first` minus those of the family `second`, paired by example."""

    first: Text
    second: Text
    bits_per_byte: Interval


class TaskResult(SparseModel):
    """Base and adapters of one task on the same held-out examples."""

    written_if_set = ("over_seeds",)

    task: Text
    objective: TaskObjective = "sft"
    """What the task's adapters minimise. The losses are those of the next token all the same: of the chosen
    completions of pairs, and of the completions of KTO."""
    examples: Count
    label_tokens: Count
    label_bytes: Count
    confidence: Confidence
    base: BaseResult
    contenders: Annotated[tuple[ContenderResult, ...], Field(min_length=1)]
    over_seeds: tuple[ContenderResult, ...] = ()
    """Means of adapters that differ in their seed only, under their common name."""
    differences: tuple[Difference, ...]
    """Between adapters, and means over seeds in the place of their adapters: of every pair, or, of very many
    adapters, of each with the best."""

    @cached_property
    def by_family(self) -> dict[str, ContenderResult]:
        """Family -> its result."""
        return {contender.family: contender for contender in self.contenders}

    @property
    def best(self) -> ContenderResult | None:
        """The adapter, or mean over seeds, with the lowest loss. None if no loss is finite."""
        contenders = (*self.contenders, *self.over_seeds)
        return next((contender for contender in contenders if contender.best), None)

    @cached_property
    def ranked(self) -> list[ContenderResult]:
        """Adapters whose losses are finite, the lowest bits per byte first."""
        values = [(contender.bits_per_byte.value, i) for i, contender in enumerate(self.contenders)]
        order = sorted((value, i) for value, i in values if value is not None)
        ranked = [self.contenders[i] for _, i in order]
        return [contender for contender in ranked if contender.difference_to_base.finite is not None]

    @cached_property
    def lead_is_clear(self) -> bool:
        """Whether the interval between the best two adapters excludes zero, or only one is finite."""
        if len(self.ranked) < 2:
            return bool(self.ranked)
        first_two = {contender.family for contender in self.ranked[:2]}
        for difference in self.differences:
            if {difference.first, difference.second} == first_two:
                return difference.bits_per_byte.excludes_zero
        return False


class SweepMember(SparseModel):
    """One setting of a sweep: an adapter, or several that differ in their seed only."""

    written_if_set = ("seeds", "deviation")

    family: Text
    settings: dict[Text, Number | Text] = {}
    """Swept key -> its value."""
    bits_per_byte: Measurement | None
    """On held-out examples; the mean over seeds. None of labels and embeddings."""
    seeds: Count = 1
    """Number of adapters."""
    deviation: Measurement | None = None
    """Standard deviation over seeds of the loss that settings are compared by."""
    preference_loss: Measurement | None = None
    """Mean loss of the objective on held-out examples of a task of preferences, labels or embeddings."""
    retired: Retirement | None = None


class SweepResult(ResultModel):
    """All settings of a sweep on one task."""

    sweep: Text
    task: Text
    objective: TaskObjective = "sft"
    winner: Text | None
    """Family with the lowest bits per byte; of preferences, labels and embeddings with the lowest loss of the
    objective. None if none is finite."""
    members: tuple[SweepMember, ...]

    def loss(self, member: SweepMember) -> float | None:
        """The loss that the settings are compared by."""
        if self.objective == "sft":
            return member.bits_per_byte
        return member.preference_loss

    @cached_property
    def by_family(self) -> dict[str, SweepMember]:
        """Family -> its member."""
        return {member.family: member for member in self.members}


class Curves(ResultModel):
    """Losses and tokens over steps."""

    training: dict[Text, tuple[LossPoint, ...]] = {}
    """Adapter -> training loss."""
    heldout: dict[Text, tuple[LossPoint, ...]] = {}
    """Adapter -> held-out loss during training."""
    drawn: dict[Text, tuple[TokenPoint, ...]] = {}
    """Task -> tokens drawn so far, at the same steps for all tasks."""
    base: dict[Text, Measurement | None] = {}
    """Task -> loss of the base model on the examples of `heldout`."""
    heldout_examples: Count | None = None
    """Examples of each task behind `heldout` and `base`. None: all."""

    @model_validator(mode="after")
    def _drawn_at_the_same_steps(self) -> Self:
        steps = [[step for step, _ in points] for points in self.drawn.values()]
        if any(other != steps[0] for other in steps):
            raise ValueError("drawn: tasks have points at different steps")
        return self


class DialogueMessage(ResultModel):
    """A message of a sample prompt."""

    role: Text
    content: Text
    """What it says; JSON of its tool calls, where it says nothing."""


class SampleCompletion(ResultModel):
    """A prompt, continued by the base model and by the adapters of its task."""

    task: Text
    prompt: Text | Annotated[tuple[DialogueMessage, ...], Field(min_length=1)]
    """A text, or messages, of which the last is answered."""
    completions: dict[Text, Text]
    """Family, or "base" -> text."""

    @property
    def is_dialogue(self) -> bool:
        """Whether messages were answered."""
        return not isinstance(self.prompt, str)

    @property
    def prompt_text(self) -> str:
        """The prompt in one text: messages begin with their role."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message.role}: {message.content}" for message in self.prompt)


class Report(SparseModel):
    """The results of a run, report.json."""

    written_if_set = ("figures", "confusions", "experts")

    schema_version: Literal[7] = SCHEMA_VERSION
    name: Text
    facts: RunFacts
    tasks: tuple[TaskSummary, ...]
    adapters: tuple[AdapterFacts, ...]
    results: tuple[TaskResult, ...]
    """Held-out losses of text, a result per task that adapters learn; tasks of labels and of embeddings have
    `figures` instead."""
    sweeps: tuple[SweepResult, ...] = ()
    curves: Curves
    completions: tuple[SampleCompletion, ...] = ()
    code: tuple[CodeSuite, ...] = ()
    """Scores on suites of programming problems."""
    speech: SpeechResults | None = None
    """Error rates of spoken tasks."""
    preferences: tuple[PreferenceResult, ...] = ()
    """Rewards on held-out preferences, a result per preference task."""
    figures: tuple[FigureResult, ...] = ()
    """Figures of answers, labels and losses: a result per task and figure."""
    confusions: tuple[ConfusionMatrix, ...] = ()
    """How often each label was predicted, a matrix per task of labels and contender."""
    experts: tuple[ExpertLoad, ...] = ()
    """Load of the experts of routed adapters on held-out texts."""
    not_measured: tuple[Text, ...]
    """What a reader might take for granted and the report does not show, as sentences."""

    @property
    def confidence(self) -> float | None:
        """Level of the intervals; None if nothing was evaluated."""
        levels = [result.confidence for result in self.results]
        levels += [figure.confidence for figure in self.figures]
        return levels[0] if levels else None

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if not self.results and not self.figures:
            raise ValueError("results and figures are empty: a report has results of some task")
        tasks = {task.name for task in self.tasks}
        families = {adapter.family for adapter in self.adapters}
        _check_known("adapters", (adapter.task for adapter in self.adapters), tasks)
        _check_known("results", (result.task for result in self.results), tasks)
        for result in self.results:
            _check_known(f"results of {result.task}", (row.family for row in result.contenders), families)
        _check_known("preferences", (result.task for result in self.preferences), tasks)
        for preference in self.preferences:
            names = [row.family for row in preference.contenders]
            _check_known(f"preferences of {preference.task}", names, {"base", *families})
            _check_known(f"preferences of {preference.task}", ["base"], names)
        for figure in self.figures:
            _check_known("figures", [figure.task], tasks)
            names = [row.family for row in figure.contenders]
            _check_known(f"figures of {figure.task}", names, {"base", *families})
        _check_known("experts", (load.adapter for load in self.experts), (a.name for a in self.adapters))
        _check_known("confusions", (matrix.task for matrix in self.confusions), tasks)
        seeds = {adapter.family: adapter.seeds_of for adapter in self.adapters}
        parts: list[TaskResult | FigureResult] = [*self.results, *self.figures]
        for part in parts:
            _check_means(part, seeds)
        for sample in self.completions:
            _check_known(f"completions of {sample.task}", ["base"], sample.completions)
        return self

    @cached_property
    def families(self) -> list[str]:
        """Families of all adapters, in order."""
        return list(dict.fromkeys(adapter.family for adapter in self.adapters))


def _check_means(part: TaskResult | FigureResult, seeds: Mapping[str, str | None]) -> None:
    """Raises ValueError if all adapters of a task have several seeds, and no mean over them is there to be
    shown. seeds: family -> the family without its seed."""
    groups = {seeds.get(row.family) for row in part.contenders}
    if None not in groups and groups.isdisjoint(row.family for row in part.over_seeds):
        raise ValueError(f"over_seeds of {part.task}: the mean over the seeds of its adapters is missing")


def _check_known(key: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{key}: {unknown[0]!r} is not described")
