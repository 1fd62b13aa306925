"""Tasks after loading: their tokenized training and held-out examples, cached on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from flora_train.config.errors import Problem, UserError
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.audio.common_voice import check_clips_exist
from flora_train.data.audio.speech_processor import SpeechProcessor
from flora_train.data.audio.speech_task import load_speech_task
from flora_train.data.balanced_draws import balance_problem
from flora_train.data.chat.rows import ChatRowEncoder
from flora_train.data.documents import RowEncoder
from flora_train.data.embeddings.costs import embedding_problems
from flora_train.data.embeddings.rows import EmbeddingRowEncoder
from flora_train.data.embeddings.spec import EmbeddingSpec, embedding_of
from flora_train.data.embeddings.split import embedding_split
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.data.labels.load import labelled_texts
from flora_train.data.labels.rows import LabelRowEncoder
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.labels.verbalizer import VerbalizerRowEncoder
from flora_train.data.member_rows import MemberRowEncoder, with_members
from flora_train.data.mixture import draw_problem
from flora_train.data.preferences.costs import largest_unit, row_costs, unit_problem
from flora_train.data.preferences.preference import Preference, preference_of
from flora_train.data.preferences.rows import PreferenceRowEncoder, check_labels
from flora_train.data.preferences.split import preference_split
from flora_train.data.sources import source_files
from flora_train.data.split_by import forget_rows
from flora_train.data.text_rows import TextRowEncoder
from flora_train.data.text_splits import load_text_splits
from flora_train.data.token_split import TokenSplit

TaskFormat: TypeAlias = Literal["text", "prompt", "chat"]
"""Texts that are learnt as a whole, prompts with completions, or conversations."""

MAX_NAMES = 4
"""Tasks that a note names."""


@dataclass(frozen=True)
class Task:
    """One loaded task of the run."""

    name: str
    weight: float
    train: TokenSplit
    validation: TokenSplit
    data_hash: str
    """SHA-256 of rows, format and tokenizer, which is the key of the cache."""
    test: TokenSplit | None = None
    """Clips, or labelled texts, that results are measured on; None: those of the validation split."""
    origin: str = ""
    """Name of the release that the rows come from, if it has one."""
    preference: Preference | None = None
    """The objective of preferences; None: every token of a completion is learnt."""
    format: TaskFormat = "text"
    """What its rows are, unless they are preferences."""
    label: LabelSpec | None = None
    """The labels of texts, from which each of its adapters learns a head; None: there is no head."""
    embedding: EmbeddingSpec | None = None
    """How embeddings are made and learnt from pairs or triplets; None: the task learns none."""
    members: tuple[str, ...] = ()
    """With task_id: the members of gates that the targets of its splits are the numbers of."""

    @property
    def evaluated(self) -> TokenSplit:
        """The examples that results are measured on: test rows, or else the held-out ones."""
        return self.validation if self.test is None else self.test

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels that its texts are evaluated by; None for regression, and for texts without labels."""
        if isinstance(self.evaluated, ChoiceSplit):
            return self.evaluated.label_names
        return None if self.label is None else self.label.labels or None


def load_tasks(
    config: RunConfig, tokenizer: Any, cache: Path, speech_processor: SpeechProcessor | None = None
) -> dict[str, Task]:
    """All tasks that some adapter learns.

    speech_processor: for speech tasks. Raises one UserError with the problems of all sources, formats, splits
    and step sizes.
    """
    tasks: dict[str, Task] = {}
    learners = _learners(config)
    learnt = {name: task for name, task in config.tasks.items() if learners[name]}
    problems = _missing_sources(learnt)  # before any data is read
    if problems and speech_processor is not None:  # reading the clips of the others may take an hour
        raise UserError(*_each_once(problems))
    missing = {problem.key.split(".")[1] for problem in problems if problem.key.startswith("tasks.")}
    load: Callable[..., Task] = load_text_task
    if speech_processor is not None:
        load = partial(load_spoken_task, speech_processor=speech_processor)
    for name, task in learnt.items():
        if name in missing:
            continue
        try:
            tasks[name] = load(name, task, config, tokenizer, cache)
        except UserError as error:
            problems += error.problems
            continue
        problems += _draw_problems(tasks[name], config)
    forget_rows()
    if problems:
        raise UserError(*problems)
    return tasks


def _draw_problems(task: Task, config: RunConfig) -> list[Problem]:
    """Problems of draws that do not fit into a step, or into a micro-batch if a loss couples their rows."""
    cached = []
    learners = {
        name: adapter
        for name, adapter in config.adapters.items()
        if task.name in (adapter.tasks or config.tasks)
    }
    for adapter in learners.values():
        has_initial_state = adapter.init_from is not None
        cached.append(task.preference is not None and task.preference.reads_cache(has_initial_state))
    examples = config.mixture.examples_per_draw
    costs = row_costs(task.train, task.preference, cached)
    problems = [
        draw_problem(
            task.name,
            costs.lengths,
            len(cached),
            examples,
            config.training.tokens_per_step,
            shared=costs.shared,
        ),
        unit_problem(
            task.name,
            task.preference,
            largest_unit(task.train, task.preference, cached, examples),
            examples=examples,
            tokens_per_microbatch=config.training.tokens_per_microbatch,
        ),
    ]
    if task.preference is None and task.embedding is None:
        problem = balance_problem(
            task.name,
            task.train,
            learners,
            examples=examples,
            tokens_per_microbatch=config.training.tokens_per_microbatch,
        )
        problems.append(problem)
    problems += embedding_problems(
        task.name,
        task.train,
        task.validation,
        examples=examples,
        tokens_per_microbatch=config.training.tokens_per_microbatch,
    )
    return [problem for problem in problems if problem is not None]


def _missing_sources(tasks: Mapping[str, TaskConfig]) -> list[Problem]:
    """Problems of the files of all sources. Warns about clips of releases that are missing."""
    problems: list[Problem] = []
    for name, task in tasks.items():
        for split, source in (("train", task.train), ("validation", task.validation), ("test", task.test)):
            try:
                if source is not None:
                    source_files(source, f"tasks.{name}.{split}")
                if source is not None and source.common_voice is not None:
                    check_clips_exist(source, f"tasks.{name}.{split}")
            except UserError as error:
                problems += error.problems
    return problems


def _each_once(problems: Sequence[Problem]) -> list[Problem]:
    """Problems without those that repeat one of another key, as where all languages have one release."""
    different: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        different.setdefault((str(problem.value), problem.hint), problem)
    return list(different.values())


def label_names(tasks: Mapping[str, Task]) -> dict[str, tuple[str, ...]]:
    """Task -> its labels, of the tasks whose adapters learn a head for labels."""
    return {name: task.label.labels for name, task in tasks.items() if task.label is not None}


def notes_on_rows(tasks: Mapping[str, Task], config: RunConfig) -> list[str]:
    """Notes on special tokens that are written in rows, and how they are read: one for all tasks that read
    them alike."""
    written_in: dict[bool, dict[str, Counter[str]]] = {}
    for name, task in tasks.items():
        written = Counter[str]()
        for split in (task.train, task.validation, task.test):
            if split is not None:
                written.update(split.counts.special_tokens)
        if written:
            written_in.setdefault(config.tasks[name].special_tokens, {})[name] = written
    return [_note_on_special_tokens(by_task, as_tokens) for as_tokens, by_task in written_in.items()]


def _note_on_special_tokens(written: Mapping[str, Counter[str]], as_tokens: bool) -> str:
    """written: task -> special token -> how many times it is written."""
    total = sum(written.values(), Counter[str]())
    most_common = ", ".join(f"{token} {count:,}" for token, count in total.most_common(3))
    if len(total) > 3:
        most_common += f" and {len(total) - 3} more"
    names = list(written)
    where = ", ".join(names[:MAX_NAMES])
    if (others := len(names) - MAX_NAMES) > 0:
        where += f" and {others} more task{'s' * (others > 1)}"
    treatment = "are tokens"
    if not as_tokens:
        key = f"tasks.{names[0]}" if len(names) == 1 else "task_defaults"
        treatment = f"are text; {key}.special_tokens=true makes them tokens"
    return f"special tokens written in rows of {where} ({total.total():,}: {most_common}) {treatment}"


def _learners(config: RunConfig) -> Counter[str]:
    """Task -> number of adapters that learn it."""
    learners = Counter[str]()
    for adapter in config.adapters.values():
        learners.update(dict.fromkeys(adapter.tasks or config.tasks, 1))
    return learners


def load_spoken_task(
    name: str,
    task: TaskConfig,
    config: RunConfig,
    tokenizer: Any,
    cache: Path,
    speech_processor: SpeechProcessor,
) -> Task:
    """A task of clips with transcripts."""
    found = load_speech_task(name, task, config, speech_processor=speech_processor, cache=cache)
    return Task(name, task.weight, found.train, found.validation, found.data_hash, found.test, found.origin)


def load_text_task(name: str, task: TaskConfig, config: RunConfig, tokenizer: Any, cache: Path) -> Task:
    """A task of text."""
    task = with_members(name, task, config.adapters)
    loaded = load_text_splits(name, task, config, tokenizer, cache)
    encoder, splits = loaded.encoder, dict(loaded.splits)
    if isinstance(encoder, MemberRowEncoder):
        encoder = encoder.inner
    preference, label, embedding = None, None, None
    if isinstance(encoder, PreferenceRowEncoder):
        preference = preference_of(task)
        max_length = config.training.max_length
        splits = {split: preference_split(tokens, max_length) for split, tokens in splits.items()}
        check_labels(splits["train"].labels, f"tasks.{name}")
    elif isinstance(encoder, LabelRowEncoder | VerbalizerRowEncoder):
        labelled = labelled_texts(task, encoder, splits, loaded.label_surveys)
        splits, label = labelled.splits, labelled.label
    elif isinstance(encoder, EmbeddingRowEncoder):
        embedding = embedding_of(task, config.mixture.examples_per_draw)
        assert embedding is not None
        splits = {split: embedding_split(tokens, embedding) for split, tokens in splits.items()}
    return Task(
        name,
        task.weight,
        splits["train"],
        splits["validation"],
        loaded.data_hash,
        test=splits.get("test"),
        preference=preference,
        label=label,
        format=_format_of(encoder),
        embedding=embedding,
        members=tuple(task.task_members or ()),
    )


def _format_of(encoder: RowEncoder) -> TaskFormat:
    if isinstance(encoder, ChatRowEncoder):
        return "chat"
    if isinstance(encoder, TextRowEncoder) and encoder.formatter.prompt is not None:
        return "prompt"
    return "text"
