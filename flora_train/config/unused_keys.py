"""Keys of a task that have no effect: errors for keys that cannot be meant, notes for keys that another
setting disables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from flora_train.config.errors import Problem, choices
from flora_train.config.metric_names import METRICS, OF_ANSWERS, is_function
from flora_train.config.task_schema import SourceConfig, TaskConfig

OF_HUB = ("subset", "data_dir", "revision", "max_rows", "fallback_hint")
MAGIC = "*?["


def ignored_keys(tasks: Mapping[str, TaskConfig]) -> list[Problem]:
    """One problem for every given key that has no effect in a task or source of its type."""
    return [
        Problem(f"tasks.{name}.{key}", value, hint)
        for name, task in tasks.items()
        for key, value, hint in _of_task(task)
    ]


def _of_task(task: TaskConfig) -> Iterator[tuple[str, Any, str]]:
    for split in ("train", "validation", "test"):
        source: SourceConfig | None = getattr(task, split)
        for key, hint in _of_source(source) if source is not None else ():
            yield f"{split}.{key}", getattr(source, key), hint
    yield from _of_metrics(task)
    yield from _of_selection(task)
    if task.is_labelled:
        yield from _of_labelled(task)
        return
    if task.speech is None:
        if task.test is not None:
            yield (
                "test",
                None,
                "is for speech tasks and labelled texts: another task of text is measured on its "
                "validation rows; remove it",
            )
        if task.max_test_examples is not None:
            hint = "is for speech tasks and labelled texts: remove it"
            yield "max_test_examples", task.max_test_examples, hint
        return
    if task.max_test_examples is not None and task.test is None:
        hint = "requires test: set it, or use max_validation_examples"
        yield "max_test_examples", task.max_test_examples, hint
    if task.truncation != "truncate":
        yield (
            "truncation",
            task.truncation,
            "is for text: transcripts that are too long are left out, and counted; remove it",
        )
    if task.sample_prompts:
        yield (
            "sample_prompts",
            task.sample_prompts,
            "is for text: a speech model transcribes its test clips; remove it",
        )
    if task.speech.prompt is not None and task.speech.token is not None:
        yield (
            "speech.token",
            task.speech.token,
            "has no effect together with speech.prompt, which sets all first tokens: remove one of them",
        )
    if task.train.common_voice is not None and task.speech.audio != "path":
        yield "speech.audio", task.speech.audio, "is always path in a Common Voice release: remove it"


def _of_labelled(task: TaskConfig) -> Iterator[tuple[str, Any, str]]:
    if task.max_test_examples is not None and task.test is None and task.test_fraction is None:
        hint = "requires test or test_fraction: set one, or use max_validation_examples"
        yield "max_test_examples", task.max_test_examples, hint
    fractions = task.validation_fraction + (task.test_fraction or 0)
    if task.validation is None and fractions >= 1:
        hint = f"and validation_fraction = {task.validation_fraction:g} leave no training rows: lower them"
        yield "test_fraction", task.test_fraction, hint


def _of_metrics(task: TaskConfig) -> Iterator[tuple[str, Any, str]]:
    if task.metrics and task.speech is not None:
        yield (
            "metrics",
            task.metrics,
            "is for text: of clips, error rates are measured (speech.metric); remove it",
        )
    elif task.metrics and task.objective is not None:
        yield (
            "metrics",
            task.metrics,
            "is for prompts with completions: of preferences, rewards are measured; remove it",
        )
    elif task.metrics and task.embeds:
        yield (
            "metrics",
            task.metrics,
            "is for text and labels: of embeddings, recall at 1 and MRR are measured; remove it",
        )
    elif task.is_labelled:
        useless = METRICS if task.has_head else OF_ANSWERS
        for metric in task.metrics:
            if metric in useless:
                hint = "is of text that is written; of labels, figures are measured without a key: remove it"
                yield "metrics", metric, hint
    if not task.answer_metrics:
        for key in ("max_metric_examples", "max_new_tokens"):
            if getattr(task, key) is not None:
                hint = "requires metrics of answers, such as rouge_l: set metrics, or remove it"
                yield key, getattr(task, key), hint


def _of_selection(task: TaskConfig) -> Iterator[tuple[str, Any, str]]:
    figure = task.select_by
    if figure is None or figure in task.selectable:
        return
    if not task.selectable:
        hint = (
            "is for labelled texts and embeddings: the best states of other tasks are those of the lowest "
            "held-out loss; remove it"
        )
        yield "select_by", figure, hint
    elif not is_function(figure):
        yield "select_by", figure, f"is no figure of this task; there are {choices(task.selectable)}"
    elif task.embeds:
        yield "select_by", figure, f"is a function, and embeddings have {choices(task.selectable)}: use one"


def _of_source(source: SourceConfig) -> Iterator[tuple[str, str]]:
    """(key, hint) of the keys of a source that have no effect."""
    fields = SourceConfig.model_fields
    given = {key for key in fields if getattr(source, key) != fields[key].default}
    for key in OF_HUB:
        if key in given and source.hub is None:
            yield key, "is for data sets of the hub: remove it, or set hub"
    if "split" in given and source.hub is None and source.common_voice is None:
        yield (
            "split",
            "is for data sets of the hub and releases of Common Voice: give the split's files instead",
        )
    if "glob" in given and source.folder is None:
        yield (
            "glob",
            "requires folder: set it, or write the pattern into files",
        )
    if "sample_by" in given and not any(_may_be_text(file) for file in source.files or ()):
        yield "sample_by", "applies to .txt files only, and the source has none: remove it"


def _may_be_text(file: str) -> bool:
    ending = PurePath(file).suffix.lower()
    return ending == ".txt" or any(mark in (ending or file) for mark in MAGIC)


def notes_on_unused(tasks: Mapping[str, TaskConfig], problems: bool, *, selects: bool = True) -> list[str]:
    """Notes on keys that another setting disables, one for all tasks together.

    problems: whether programming problems are solved; selects: whether states are compared during training.
    """
    found: dict[str, list[str]] = {}
    for name, task in tasks.items():
        if task.select_by is not None and not selects:
            hint = "select_by is not used: no states are compared (evaluation.interval and select_best)"
            found.setdefault(hint, []).append(name)
        if task.language is not None and not problems:
            found.setdefault("language is not used: evaluation.problems names no problems", []).append(name)
        if (
            task.validation is not None
            and task.validation_fraction != TaskConfig.model_fields["validation_fraction"].default
        ):
            found.setdefault("validation_fraction is not used: the validation rows are given", []).append(
                name
            )
        if task.validation is not None and task.speech is not None and task.speech.speaker is not None:
            found.setdefault("speech.speaker is not used: the validation rows are given", []).append(name)
    return [f"tasks.{_some(names)}.{what}" for what, names in found.items()]


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{{{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}}}"
