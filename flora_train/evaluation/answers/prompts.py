"""Held-out prompts of a task, with the completions that answers to them are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from torch import nn

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import Problem, UserError
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.chat.encoder import ChatEncoder
from flora_train.data.chat.end_of_turn import end_of_turn
from flora_train.data.chat.template import ChatTemplate
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.data.task import Task
from flora_train.data.text_encoder import TextEncoder
from flora_train.evaluation.generation.context_limit import MAX_NEW_TOKENS, check_prompts
from flora_train.evaluation.generation.decoder import end_tokens_of
from flora_train.models.probe_inputs import count_tokens


@dataclass(frozen=True)
class HeldoutPrompt:
    """A prompt, and the text that follows it in the data."""

    example: int
    """Its number in the validation split."""
    tokens: tuple[int, ...]
    reference: str
    """Without white space at its ends."""

    @cached_property
    def sha(self) -> str:
        """SHA-256 of the prompt and its reference."""
        return sha256(repr((self.tokens, self.reference)).encode()).hexdigest()


@dataclass(frozen=True)
class AnsweredTask:
    """The prompts of a task that base and adapters answer."""

    name: str
    metrics: tuple[str, ...]
    prompts: tuple[HeldoutPrompt, ...]
    examples: int
    """Held-out examples of the task."""
    max_new_tokens: int
    end_tokens: frozenset[int]
    stops: tuple[str, ...]

    @property
    def setting(self) -> str:
        """How answers are generated, in words."""
        return f"greedy, up to {self.max_new_tokens} tokens"


def answered_tasks(
    config: RunConfig, tasks: Mapping[str, Task], model: nn.Module, tokenizer: Any
) -> list[AnsweredTask]:
    """The tasks with metrics of answers. Raises one UserError for tasks whose rows have no prompts."""
    answered: list[AnsweredTask] = []
    problems: list[Problem] = []
    for name, task in tasks.items():
        if config.tasks[name].answer_metrics:
            try:
                answered.append(_answered_task(config, task, model, tokenizer))
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    return answered


def check_answered(config: RunConfig, tasks: Sequence[AnsweredTask], model: Any, tokenizer: Any) -> None:
    """Raises UserError if a prompt and its answer do not fit into what the model can read."""
    for task in tasks:
        key = MAX_NEW_TOKENS
        if config.tasks[task.name].max_new_tokens is not None:
            key = f"tasks.{task.name}.max_new_tokens"
        check_prompts(
            tokenizer,
            {f"tasks.{task.name}.metrics": ([prompt.tokens for prompt in task.prompts], False)},
            vocabulary=count_tokens(model),
            model=config.model,
            model_config=model.config,
            max_new_tokens=task.max_new_tokens,
            key=key,
        )


def contenders_of(specs: Sequence[AdapterSpec], task: str) -> list[int]:
    """The base and the adapters of a task."""
    return [-1, *(i for i, spec in enumerate(specs) if spec.task == task)]


def _answered_task(config: RunConfig, task: Task, model: nn.Module, tokenizer: Any) -> AnsweredTask:
    options, key = config.tasks[task.name], f"tasks.{task.name}"
    end_tokens, stops = end_tokens_of(model, tokenizer), tuple[str, ...]()
    if task.format == "chat":
        template = ChatTemplate.of(tokenizer, options.chat_template, key)
        of_turn, stops = end_of_turn(ChatEncoder(template, tokenizer, options.special_tokens))
        end_tokens |= of_turn
    prompts: tuple[HeldoutPrompt, ...] = ()
    if _has_prompts(task, options):
        prompts = tuple(_prompts(task, TextEncoder(tokenizer), end_tokens, stops))
    if not prompts:
        raise _without_prompts(task, f"{key}.metrics", options.answer_metrics)
    return AnsweredTask(
        name=task.name,
        metrics=tuple(options.answer_metrics),
        prompts=prompts[: options.max_metric_examples],
        examples=len(task.validation),
        max_new_tokens=options.max_new_tokens or config.evaluation.max_new_tokens,
        end_tokens=end_tokens,
        stops=stops,
    )


def _has_prompts(task: Task, options: TaskConfig) -> bool:
    """Whether the rows of a task have prompts, whose completions are learnt."""
    if isinstance(task.validation, PreferenceSplit) or task.format == "text":
        return False
    return options.learn != "all"


def _prompts(
    task: Task, encoder: TextEncoder, end_tokens: frozenset[int], stops: tuple[str, ...]
) -> Iterator[HeldoutPrompt]:
    """The prompts of examples whose completion is whole: the last learnt span of each follows one."""
    split = task.validation
    may_be_cut = split.counts.over_long_truncated > 0
    for example in range(len(split)):
        ((tokens, spans),) = split.documents(example)
        begin, end = spans[-1].tolist()
        prompt, learnt = tokens[:begin].tolist(), tokens[begin:end].tolist()
        length = next((i for i, token in enumerate(learnt) if token in end_tokens), None)
        if begin <= len(encoder.start) or (length is None and may_be_cut and not stops):
            continue
        text = encoder.decode_after(prompt, learnt[:length])
        cuts = [position for stop in stops if (position := text.find(stop)) >= 0]
        yield HeldoutPrompt(example, tuple(prompt), text[: min(cuts, default=len(text))].strip())


def _without_prompts(task: Task, key: str, metrics: Sequence[str]) -> UserError:
    hint = (
        "no held-out example has a prompt with a whole completion: metrics of answers need rows with prompt "
        "and completion, or conversations with learn: assistant or last, that fit into training.max_length"
    )
    if isinstance(task.validation, PreferenceSplit):
        hint = "is for prompts with completions, and the rows are preferences: remove it"
    return UserError(Problem(key, list(metrics), hint))
